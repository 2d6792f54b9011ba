"""One launch plan on one device: its memory, its packed launches, its CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels import library
from edadm_compile.kernels.cubin import INTEGER, POINTER, Cubin
from edadm_compile.kernels.launch import Launch
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.request import DIVISIBILITY, is_aligned
from edadm_compile.runtime.engines.cuda_driver import Arguments, Driver

#: Enqueues one launch on a stream given by its handle.
Step = Callable[[int], None]


#: Whether kernels are enqueued to overlap. On an H200 the CIFAR-10 UNet's step took 4 to 19 % longer with it, when
#: kernels let the next one in before their own wait (``benchmarks/results/h200/early_launches.txt``); as they do now,
#: behind it, it has not been measured. Until it is shown to pay it is off.
START_EARLY = False


def may_start_early(keys: Sequence[str], cubins: Mapping[str, Cubin], conditioning: int) -> list[bool]:
    """For each launch, whether it may be set up while the one before it runs.

    Both have to be kernels that wait by themselves: of three in a row, the third waits for the second, which ends
    after it has waited for the first. The first launch of a part (conditioning, step) follows copies.
    """
    waits = [key != "" and cubins[key].overlaps for key in keys]
    return [i not in (0, conditioning) and waits[i] and waits[i - 1] for i in range(len(keys))]


class PlanRunner:
    """Executes a plan from its static inputs to its static output.

    Args:
        memory: of the plan, on the device.
        keys: for each launch a key of `cubins`, "" for torch.
        cubins: compiled kernels.
        driver: loads and launches them.
        graphs: record CUDA graphs and replay them, else enqueue launch by launch.
    """

    def __init__(
        self, memory: Memory, keys: Sequence[str], cubins: Mapping[str, Cubin], driver: Driver, graphs: bool
    ) -> None:
        self.memory, self.plan = memory, memory.plan
        early = [START_EARLY and can for can in may_start_early(keys, cubins, self.plan.conditioning)]
        self.steps = [
            self._torch_step(launch) if key == "" else self._step(launch, cubins[key], driver, early[index])
            for index, (launch, key) in enumerate(zip(self.plan.launches, keys, strict=True))
        ]
        self._graphs = graphs
        self._recorded: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def run(self, conditioning: bool) -> Tensor:
        """Enqueue the plan on the current stream.

        Args:
            conditioning: whether the launches that depend on the conditions alone run too.

        Returns:
            the static output, float32; the next run overwrites it.
        """
        first = self.plan.conditioning
        if conditioning and first:
            self._enqueue(0, first)
        self._enqueue(first, len(self.steps))
        return self.memory.output

    def _enqueue(self, start: int, stop: int) -> None:
        if not self._graphs:
            self._launch(start, stop)
        elif start < stop:
            if (start, stop) not in self._recorded:
                self._recorded[start, stop] = self._record(start, stop)
            self._recorded[start, stop].replay()

    def _record(self, start: int, stop: int) -> torch.cuda.CUDAGraph:
        self._launch(start, stop)  # outside the graph once: loads modules, makes the handles of libraries
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(start, stop)
        return graph

    def _launch(self, start: int, stop: int) -> None:
        device = self.memory.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        for step in self.steps[start:stop]:
            step(stream)

    def _torch_step(self, launch: Launch) -> Step:
        views = {role: self.memory.view(operand) for role, operand in launch.operands.items()}
        return lambda stream: library.run(launch, views)

    def _step(self, launch: Launch, cubin: Cubin, driver: Driver, early: bool) -> Step:
        found = kernel(launch.kernel)
        values = [self._pointer(launch, role) for role in found.roles if role in launch.operands]
        kinds = [POINTER] * len(values) + [INTEGER] * len(found.scalars)
        values += [launch.scalars[name] for name in found.scalars]
        scratch = len(cubin.params) - len(values)  # pointers of the compiler behind ours, never used: null
        kinds += [POINTER] * scratch
        if tuple(kinds) != cubin.params:
            raise ArtifactError(
                f"{launch.layer}: kernel {cubin.name} takes {cubin.params}, the plan gives {tuple(kinds)}; "
                "recompile the model with this version"
            )
        enqueue = partial(driver.launch, driver.load(cubin), found.grid(found.values(launch)), 32 * cubin.num_warps)
        arguments = Arguments([*values, *[0] * scratch], kinds)
        return lambda stream: enqueue(cubin.shared, stream, arguments, early)

    def _pointer(self, launch: Launch, role: str) -> int:
        operand = launch.operands[role]
        pointer = self.memory.view(operand).data_ptr()
        if is_aligned(operand) and pointer % DIVISIBILITY:  # the kernel was compiled for wide loads
            raise ArtifactError(f"{launch.layer}: {role} lies at {pointer}, not at a multiple of {DIVISIBILITY}")
        return pointer
