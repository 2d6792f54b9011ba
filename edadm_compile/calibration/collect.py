"""Collect the calibration set: score one batch of trajectories, then run each sample's own one just far enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from edadm_compile.calibration import diagnosis, guidance, sampler, tdac
from edadm_compile.calibration.dataset import CalibrationSet, Trajectories
from edadm_compile.calibration.given import CalibrationSamples, given_set
from edadm_compile.config import QuantConfig
from edadm_compile.errors import CalibrationError
from edadm_compile.ir.analysis import shape_of, x_dependent
from edadm_compile.ir.footprint import MOST_BYTES, rows_at_once
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program
from edadm_compile.parallel.world import World, divided

_UP_OPS = ("upsample", "conv_transpose", "pixel_shuffle", "cat.default", "concat.default")
#: Trajectories advanced together; bounds memory, not the result.
_CHUNK = 64


def bottleneck(program: Program, override: str | None = None) -> fx.Node:
    """The node whose value TDAC looks at: the last one at the lowest resolution before the up path begins.

    Args:
        override: name of a graph node to use instead.

    Raises:
        CalibrationError: no 4-D activation, or an unknown override.
    """
    graph = program.graph_module.graph
    if override is not None:
        named: fx.Node | None = next((n for n in graph.nodes if n.name == override), None)
        if named is None:
            raise CalibrationError(f"bottleneck: no node called {override!r} in the float graph")
        return named
    dependent = x_dependent(graph)
    maps = [
        n
        for n in graph.nodes
        if n in dependent and n.op == "call_function" and len(shape_of(n)) == 4 and n.meta.get("dtype") == torch.float32
    ]
    maps = [n for n in maps if shape_of(n)[2] > 1 and shape_of(n)[3] > 1] or maps
    if not maps:
        raise CalibrationError("bottleneck: the graph has no 4-D activation; name a node to use instead")
    area = min(shape_of(n)[2] * shape_of(n)[3] for n in maps)
    found: fx.Node | None = None
    for node in maps:
        lowest = shape_of(node)[2] * shape_of(node)[3] == area
        if found is not None and any(word in op_name(node.target) for word in _UP_OPS):
            break
        if lowest:
            found = node
    assert found is not None
    return found


class _FeatureTap(fx.Interpreter):
    """Runs a graph, each process its share of the rows, and keeps one node's value for all of them."""

    def __init__(self, program: Program, node: fx.Node, world: World) -> None:
        super().__init__(program.graph_module)
        self._node = node
        self._program = program.at_most(rows_at_once(program, MOST_BYTES, program.signature.max_batch))
        self._world = world
        self.feature = torch.empty(0)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n is self._node:
            assert isinstance(result, Tensor)
            self.feature = result
        return result

    def __call__(self, *inputs: Tensor) -> Tensor:
        share = self._world.share(inputs[0].shape[0])
        prediction = self._rows(*share.of(inputs))
        self.feature = self._world.join(self.feature, share)
        return self._world.join(prediction, share)

    def _rows(self, *inputs: Tensor) -> Tensor:
        signature = self._program.signature
        if not signature.min_batch <= inputs[0].shape[0] <= signature.max_batch:
            parts, features = [], []
            for piece, rows in signature.batches(inputs):
                parts.append(self._rows(*piece)[:rows])
                features.append(self.feature[:rows])
            self.feature = torch.cat(features)
            return torch.cat(parts)
        prediction: Tensor = self.run(*self._program.graph_inputs(inputs))
        return prediction


def collect(
    program: Program,
    config: QuantConfig,
    generator: torch.Generator,
    *,
    pool: dict[str, Tensor] | None = None,
    given: CalibrationSamples | None = None,
    advance: Callable[[int, str], None] = lambda steps, message: None,
    world: World | None = None,
) -> CalibrationSet:
    """Choose and collect calibration samples for a float program.

    Each sample belongs to its own trajectory (its own noise and condition), run only down to its step. Under guidance
    each becomes two rows, (x, t, null) and (x, t, condition): the sampler calls the model with both.

    Args:
        pool: the user's condition tensors by name.
        given: the user's own samples, taken instead; the scoring batch is still run, for the passes that measure on it.
        advance: progress callback (model evaluations done, remark).
        world: processes that share the rows of each batch; all of them get the whole set.

    Raises:
        CalibrationError: the model's prediction is not finite.
        InputError: given samples that the model cannot be called with.
    """
    world = world or World()
    if given is not None:
        given.inputs(program.signature)  # refused before the work
    trajectories, features = _score_batch(program, config, generator, pool, advance, world)
    if given is not None:
        return given_set(program, given, trajectories)
    steps = len(features)
    allocation = tdac.choose(config.recipe.selection, features, trajectories.t, config.calib_samples, config.tdac)
    assigned = torch.repeat_interleave(torch.arange(steps), allocation.counts)
    x = sampler.draw_noise(program.signature, assigned.numel(), generator)
    conditions = sampler.draw_conditions(program.signature, assigned.numel(), generator, pool, program.sampler.null)
    states = []
    chunk = rows_at_once(program, MOST_BYTES / program.sampler.branches, _CHUNK)
    for rows in torch.arange(assigned.numel()).split(chunk):  # sorted by step: a chunk stops early together
        mine = x[rows], [c[rows] for c in conditions], assigned[rows]
        states.append(_run_down(program, *mine, generator, advance, world))
    order = torch.randperm(assigned.numel(), generator=generator)
    x, assigned, conditions = torch.cat(states)[order], assigned[order], [c[order] for c in conditions]
    if program.sampler.guided:
        conditions = guidance.interleaved(program.sampler, conditions)
        x, assigned = x.repeat_interleave(2, dim=0), assigned.repeat_interleave(2)
    return CalibrationSet(x, trajectories.t[assigned], tuple(conditions), assigned, allocation, trajectories)


def _score_batch(
    program: Program,
    config: QuantConfig,
    generator: torch.Generator,
    pool: dict[str, Tensor] | None,
    advance: Callable[[int, str], None],
    world: World,
) -> tuple[Trajectories, list[Tensor]]:
    tap = _FeatureTap(program, bottleneck(program), world)
    n = config.tdac.trajectories
    x = sampler.draw_noise(program.signature, n, generator)
    conditions = sampler.draw_conditions(program.signature, n, generator, pool, program.sampler.null)
    rows = tuple(guidance.both_branches(program.sampler, conditions))
    features: list[Tensor] = []
    states: list[Tensor] = []
    predictions: list[Tensor] = []
    times: list[float] = []

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        if not bool(torch.isfinite(prediction).all()):
            inputs = (x_in, torch.full((x_in.shape[0],), t).to(program.signature.inputs[1].dtype), *rows)
            raise CalibrationError(
                f"the model's prediction at timestep {t:g} is not finite: {diagnosis.explain(program, inputs)}; check the "
                "weights, the conditions and the scheduler"
            )
        # A scheduler such as PNDM calls the model more than once at some timesteps: every call is a step here.
        features.append(tap.feature)
        states.append(x_in.clone())
        predictions.append(prediction)
        times.append(t)
        advance(x_in.shape[0], f"scoring t={t:g}")

    sampler.sample(tap, program.sampler, x, conditions, generator=generator, hook=hook)
    t = torch.tensor(times, dtype=torch.float64).to(program.signature.inputs[1].dtype)
    return Trajectories(torch.stack(states), torch.stack(predictions), t, rows), features


def _run_down(
    program: Program,
    x: Tensor,
    conditions: list[Tensor],
    assigned: Tensor,
    generator: torch.Generator,
    advance: Callable[[int, str], None],
    world: World,
) -> Tensor:
    """States of a chunk of trajectories, each at its assigned step."""
    result = torch.empty_like(x)

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        here = assigned == index
        result[here] = x_in[: x.shape[0]][here]  # under guidance both halves of the batch are the same states
        advance(x_in.shape[0], f"collecting t={t:g}")

    last = int(assigned.max())
    model = divided(program, world)
    sampler.sample(model, program.sampler, x, conditions, generator=generator, hook=hook, stop_after=last + 1)
    return result
