"""Search for tiles: the candidates of every matrix shape as plans of one launch, and the choice between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edadm_compile.driver.single_launch import isolate
from edadm_compile.errors import TargetError
from edadm_compile.ir.program import Program
from edadm_compile.kernels import qconv2d_sm90, tiles
from edadm_compile.kernels.launch import Launch, LaunchPlan, Tile
from edadm_compile.kernels.registry import kernel
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import fix_batch, make_plan
from edadm_compile.passes.base import Progress

#: Kernels whose tiles are searched.
TUNED = ("qconv2d", "qlinear", "qconv2d_sm90", "qlinear_sm90")
#: Candidates of the cost model, and how many of the best are tried with other pipeline depths too.
CANDIDATES, DEEP = 9, 2
#: How many of the best are tried with longer K steps.
DEEPER = 4
#: Microseconds of one plan of one launch; `TargetError` for one that cannot run or computes something else.
Measure = Callable[[LaunchPlan], float]


@dataclass(frozen=True)
class Shape:
    """One matrix shape of the plans.

    Attributes:
        key: `tiles.tile_key`.
        layer: the first layer that has it.
        count: launches of this shape in a step, over all plans.
        candidates: plans of one launch, the built-in choice first.
    """

    key: str
    layer: str
    count: int
    candidates: tuple[LaunchPlan, ...]

    def tile(self, index: int) -> Tile:
        """Tile of a candidate."""
        return self.candidates[index].launches[0].tile


@dataclass
class Found:
    """Result of a search so far.

    Attributes:
        best: by key: index of the fastest candidate.
        times: by key: microseconds by index of candidate.
        rejected: by key: why candidates were not taken.
        untried: keys that were not reached.
        stopped: why the search ended early; empty if it did not.
    """

    best: dict[str, int] = field(default_factory=dict)
    times: dict[str, dict[int, float]] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)
    stopped: str = ""

    def tiles(self, shapes: Sequence[Shape]) -> dict[str, Tile]:
        """The chosen tiles by key."""
        return {shape.key: shape.tile(self.best[shape.key]) for shape in shapes if shape.key in self.best}


def shortlist(launch: Launch, arch: str) -> list[Tile]:
    """Tiles to try for a launch: its own, the best of the cost model, the best of these with other pipeline depths."""
    values = kernel(launch.kernel).values(launch)
    ranked = sorted(tiles.candidates(values, arch), key=lambda tile: tiles.cost(values, tile, arch))[:CANDIDATES]
    deep = [replace(tile, num_stages=stages) for tile in ranked[:DEEP] for stages in (2, 3, 4)]
    found: list[Tile] = []
    asynchronous = qconv2d_sm90.candidates(values) if arch == "sm_90" else []
    longer = [tiles.deeper(values, tile, arch) for tile in ranked[:DEEPER]]
    for tile in (launch.tile, *ranked, *asynchronous, *deep, *longer):
        if tile is not None and tile not in found:
            found.append(tile)
    return found


def shapes_of(program: Program, targets: Sequence[Target], advance: Callable[[], None] | None = None) -> list[Shape]:
    """The distinct matrix shapes of the plans for `targets`, the most expensive first (by the cost model).

    What depends on a tile (workspaces, statistics, the layout of gated weights) is made by the planner itself: the
    plan is made once for the first candidates of all shapes, once for the second, and so on.
    """
    found = [shape for target in targets for shape in _shapes(program, target, advance or (lambda: None))]
    return sorted(found, key=_weight, reverse=True)


def _weight(shape: Shape) -> float:
    launch = shape.candidates[0].launches[0]
    values = kernel(launch.kernel).values(launch)
    count = values["pixels"] if tiles.family(launch.kernel) == "qconv2d" else values["rows"]
    return float(shape.count * values["O"] * count * values["C"] * values.get("KH", 1) * values.get("KW", 1))


def _shapes(program: Program, target: Target, advance: Callable[[], None]) -> list[Shape]:
    fixed = fix_batch(program, target.batch, target.float_layers)
    plain = make_plan(program, target, fixed)
    advance()
    first: dict[str, Launch] = {}
    counts: dict[str, int] = {}
    for launch in plain.launches:
        if launch.kernel in TUNED:
            key = key_of(launch)
            first.setdefault(key, launch)
            counts[key] = counts.get(key, 0) + 1
    lists = {key: shortlist(launch, target.arch) for key, launch in first.items()}
    candidates: dict[str, list[LaunchPlan]] = {key: [isolate(plain, launch)] for key, launch in first.items()}
    for number in range(1, max(map(len, lists.values()), default=1)):
        chosen = {key: choices[number] for key, choices in lists.items() if number < len(choices)}
        plan = make_plan(program, replace(target, tiles={**target.tiles, **chosen}), fixed)
        launches = {(key_of(launch), launch.layer): launch for launch in plan.launches if launch.kernel in TUNED}
        for key in chosen:
            candidates[key].append(isolate(plan, launches[key, first[key].layer]))
        advance()
    return [Shape(key, first[key].layer, counts[key], tuple(plans)) for key, plans in candidates.items()]


def key_of(launch: Launch) -> str:
    """The key of a launch in a table of tiles."""
    return tiles.tile_key(launch.kernel, kernel(launch.kernel).values(launch))


def search(
    shapes: Sequence[Shape],
    measure: Measure,
    *,
    progress: Progress,
    budget: float | None = None,
    refused: Mapping[tuple[str, int], str] | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Found:
    """Measure the candidates of each shape and keep the fastest.

    Stops after a whole shape when `budget` is used up; an interruption (Ctrl-C) keeps the shapes that are complete.

    Args:
        shapes: in the order in which they are tried.
        measure: as `Measure`.
        budget: seconds; None for no limit.
        refused: candidates known not to run, by key and index, with the reason.
        now: seconds.
    """
    found, start = Found(), now()
    progress.stage("tiles", sum(len(shape.candidates) for shape in shapes))
    for number, shape in enumerate(shapes):
        if budget is not None and now() - start > budget:
            found.stopped = "the budget is used up"
        try:
            if not found.stopped:
                _try(shape, measure, found, progress, refused or {})
                continue
        except KeyboardInterrupt:
            found.stopped = "interrupted"
        found.untried = [s.key for s in shapes[number:]]
        break
    return found


def _try(
    shape: Shape, measure: Measure, found: Found, progress: Progress, refused: Mapping[tuple[str, int], str]
) -> None:
    times: dict[int, float] = {}
    reasons: list[str] = []
    for index, plan in enumerate(shape.candidates):
        try:
            if (shape.key, index) in refused:
                raise TargetError(refused[shape.key, index])
            times[index] = measure(plan)
        except TargetError as error:
            reasons.append(str(error))
        progress.advance(1, shape.layer)
    if reasons:
        found.rejected[shape.key] = reasons
    if times and 0 in times:  # without a time for the built-in choice nothing can be said to be faster
        found.times[shape.key] = times
        found.best[shape.key] = min(times, key=lambda index: (times[index], index))
