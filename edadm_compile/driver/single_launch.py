"""One launch of a plan on its own: a plan with nothing else in it, random data, something that runs it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from edadm_compile.errors import TargetError
from edadm_compile.evaluate.timing import Clock, EventClock, Timing, in_graph
from edadm_compile.kernels import aot, execute
from edadm_compile.kernels.cubin import Cubin
from edadm_compile.kernels.launch import ALIGNMENT, Buffer, Launch, LaunchPlan
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.tiles import family
from edadm_compile.lowering.layout import round_up
from edadm_compile.runtime.engines.cuda_driver import Driver, cuda_driver
from edadm_compile.runtime.engines.cuda_plan import PlanRunner

#: Share of codes that may differ by one from the reference kernel, whose multiply-adds round differently.
_TIES = 0.01


def isolate(plan: LaunchPlan, launch: Launch) -> LaunchPlan:
    """A plan of one launch: the buffers, constants and inputs it uses, each buffer in a place of its own."""
    arena = sorted({int(o.key) for o in launch.operands.values() if o.space == "arena"})
    position, buffers, end = {key: i for i, key in enumerate(arena)}, [], 0
    for key in arena:
        old = plan.buffers[key]
        buffers.append(Buffer(old.size, 0, 0, end, old.name))
        end += round_up(old.size, ALIGNMENT)
    operands = {
        role: replace(o, key=position[int(o.key)]) if o.space == "arena" else o for role, o in launch.operands.items()
    }
    keys = {str(o.key) for o in launch.operands.values()}
    return replace(
        plan,
        launches=(replace(launch, operands=operands),),
        buffers=tuple(buffers),
        arena=end,
        constants={name: spec for name, spec in plan.constants.items() if name in keys},
        inputs={name: value for name, value in plan.inputs.items() if name in keys},
        conditioning=0,
        tables={},
    )


def fill(memory: Memory, seed: int = 0) -> None:
    """Random data in everything a launch of `memory` reads and no launch writes: zeros would save power, and so time.

    Codes are uniform over their type, floats standard normal, indices 0. The same role of the same shape gets the same
    values in every plan on one device.
    """
    for launch in memory.plan.launches:
        for role, operand in sorted(launch.operands.items()):
            if role in launch.writes or operand.space not in ("arena", "input"):
                continue
            generator = torch.Generator(memory.device).manual_seed(zlib.crc32(f"{role} {seed}".encode()))
            memory.view(operand).copy_(_random(operand.shape, operand.dtype, generator))


def _random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    where = generator.device
    if dtype in (torch.int8, torch.uint8):
        info = torch.iinfo(dtype)
        made = torch.randint(info.min, info.max + 1, tuple(shape), generator=generator, dtype=torch.int16, device=where)
        return made.to(dtype)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator, device=where).to(dtype)
    return torch.zeros(tuple(shape), dtype=dtype, device=where)


def operations(launch: Launch) -> int:
    """Multiplications and additions of the matrix products in a launch, 0 where there are none."""
    v = {**launch.constants, **launch.scalars}
    name = family(launch.kernel)
    if name in ("qconv2d", "qlinear"):
        taps = int(v.get("KH", 1)) * int(v.get("KW", 1))
        depth = int(v["C"]) + (int(v["C2"]) if v.get("SEGMENTS") == 2 else 0)
        count = int(v["pixels"] if name == "qconv2d" else v["rows"])
        return 2 * int(v["O"]) * (2 if v.get("GLU") else 1) * count * taps * depth
    if launch.kernel in ("attention", "attention_float"):
        return 4 * int(v["batch"]) * int(v["HEADS"]) * int(v["LQ"]) * int(v["LK"]) * int(v["D"])
    return 0


def traffic(launch: Launch) -> int:
    """Bytes a launch must move: every element of every operand once (what the compiler reads again is not counted)."""
    return sum(math.prod(o.shape) * o.dtype.itemsize for o in launch.operands.values())


def agrees(value: Tensor, expected: Tensor) -> bool:
    """Codes up to ties, floats within two roundings of their type."""
    if not value.dtype.is_floating_point:
        distance = (value.int() - expected.int()).abs()
        return int(distance.max()) <= 1 and float(distance.double().mean()) <= _TIES
    unit = max(torch.finfo(value.dtype).eps, 1e-5)  # the fast activations are not exact to float32
    finite = expected.double().nan_to_num(posinf=0.0, neginf=0.0).abs()
    bound = 2 * unit * finite + 2e-6 * finite.max()  # terms may cancel: the largest value tells their size
    return bool(((value == expected) | ((value.double() - expected.double()).abs() <= bound)).all())


class Runner(Protocol):
    """Runs plans on a device and times single calls of them."""

    device: torch.device

    def prepare(self, plans: Sequence[LaunchPlan], advance: aot.Advance | None = None) -> dict[int, str]:
        """Compile; returns by position why a plan cannot run."""

    def bind(self, memory: Memory) -> Callable[[], object]:
        """A call that enqueues the launches of a plan (prepared before) over its memory."""

    def time(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        """Microseconds per call of each, in turns, without the time of the host."""


@dataclass
class GpuRunner:
    """Compiled kernels on a GPU, timed from CUDA graphs of many repetitions.

    Attributes:
        device: a CUDA device.
        jobs: processes that compile at the same time; None for one per core.
        turn: microseconds the repetitions in a graph should last.
        driver: loads and launches kernels; the CUDA driver by default.
        clock: times the replay of a graph.
    """

    device: torch.device
    jobs: int | None = None
    turn: float = 2_000.0
    driver: Driver | None = None
    clock: Clock = field(default_factory=EventClock)
    _cubins: dict[str, Cubin] = field(default_factory=dict)

    def prepare(self, plans: Sequence[LaunchPlan], advance: aot.Advance | None = None) -> dict[int, str]:
        """As `Runner.prepare`; one kernel that does not compile costs no other its place."""
        try:
            self._cubins |= aot.compile_plans(plans, jobs=self.jobs, progress=advance)
            return {}
        except TargetError:
            pass  # what was compiled is in the cache: go through them one by one
        refused = {}
        for i, plan in enumerate(plans):
            try:
                self._cubins |= aot.compile_plans([plan], jobs=1)
            except TargetError as error:
                refused[i] = str(error)
        return refused

    def bind(self, memory: Memory) -> Callable[[], object]:
        """As `Runner.bind`."""
        driver = cuda_driver() if self.driver is None else self.driver
        runner = PlanRunner(memory, aot.plan_keys(memory.plan), self._cubins, driver, graphs=False)
        return lambda: runner.run(True)

    def time(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        """As `Runner.time`."""
        graphs, repeats = {}, {}
        for name, call in calls.items():
            once = in_graph(call, 10)
            once(0)
            estimate = self.clock.measure(once, 0, 2) / 10
            repeats[name] = max(10, min(500, math.ceil(self.turn / max(estimate, 0.1))))
            graphs[name] = once if repeats[name] == 10 else in_graph(call, repeats[name])
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(rounds + 1):
            for name, graph in graphs.items():
                value = self.clock.measure(graph, 0, 1) / repeats[name]
                if turn:  # the first turn warms up
                    samples[name].append(value)
        return {name: Timing(tuple(values)) for name, values in samples.items()}


@dataclass
class ReferenceRunner:
    """Reference kernels on the CPU: for tests and dry runs; what its clock says is not a time of any kernel."""

    clock: Clock
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def prepare(self, plans: Sequence[LaunchPlan], advance: aot.Advance | None = None) -> dict[int, str]:
        """Nothing to compile."""
        return {}

    def bind(self, memory: Memory) -> Callable[[], object]:
        """As `Runner.bind`."""

        def run() -> None:
            for launch in memory.plan.launches:
                execute.reference(launch, {role: memory.view(o) for role, o in launch.operands.items()})

        return run

    def time(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        """As `Runner.time`."""
        return {
            name: Timing(tuple(self.clock.measure(lambda number, call=call: call(), 0, 1) for _ in range(rounds)))  # type: ignore[misc]
            for name, call in calls.items()
        }
