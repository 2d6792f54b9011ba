"""The CUDA engine: compiled kernels of a launch plan, enqueued as CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import InputError, TargetError
from edadm_compile.ir.program import Program, get_constant, placeholders
from edadm_compile.ir.timesteps import as_timesteps
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.kernels.launch import TIME_TABLES, LaunchPlan
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.targets import TARGETS, arch_of
from edadm_compile.runtime.engines.cuda_driver import Driver, cuda_driver
from edadm_compile.runtime.engines.cuda_plan import PlanRunner
from edadm_compile.runtime.engines.cuda_time import TimeRows


class CudaEngine:
    """Runs a program on a GPU from machine code made ahead of time.

    A call takes the plan of its batch size; other sizes take the smallest plan that holds them, its spare rows filled
    with repetitions, and batches above the largest plan are cut. Inputs may lie on any device. Timesteps on the host
    cost no synchronisation, timesteps on the GPU one. Calls from several threads wait for each other.

    The part of the model that depends on the conditions alone runs again only when a condition is another tensor or
    was written to: contents are compared for tensors on the host, torch's version counter for others. Writes past
    that counter (through ``.data``, a CUDA graph or a foreign kernel) need `forget_conditions`.

    Args:
        program: the lowered program.
        bundle: its device code.
        device: a CUDA device.
        tensors: a tensor of the program by name; from the program by default.
        arch: architecture to take from the bundle; that of the device by default.
        driver: loads and launches kernels; the CUDA driver by default.
        graphs: record and replay CUDA graphs.

    Raises:
        TargetError: no code for this GPU in the bundle, or a missing driver.
    """

    name = "cuda"

    def __init__(
        self,
        program: Program,
        bundle: Bundle,
        device: torch.device | str = "cuda",
        *,
        tensors: Callable[[str], Tensor] | None = None,
        arch: str | None = None,
        driver: Driver | None = None,
        graphs: bool = True,
    ) -> None:
        self.program, self.bundle, self.device = program, bundle, _indexed(torch.device(device))
        self.arch = arch_of(self.device) if arch is None else arch
        self.batches = bundle.batches(self.arch)
        if not self.batches:
            raise TargetError(_no_code(self.arch, bundle))
        self._tensors = tensors or (lambda name: get_constant(program.graph_module, name))
        self._driver = cuda_driver() if driver is None else driver
        self._graphs = graphs and self.device.type == "cuda"
        self._runners: dict[int, _Batch] = {}
        self._constants: dict[str, Tensor] = {}
        self._rows: dict[object, TimeRows] = {}
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Predict the noise for x [B, ...], t [B] and conditions; float32 on the engine's device, a new tensor.

        Raises:
            InputError: a wrong number of inputs, or a timestep outside a complete table.
        """
        specs = self.program.signature.inputs
        if len(inputs) != len(specs) or len({len(value) for value in inputs}) != 1 or len(inputs[0]) < 1:
            shapes = [list(value.shape) for value in inputs]
            raise InputError(
                f"got inputs of shapes {shapes}, expected {', '.join(s.name for s in specs)}, each [B, ...]"
            )
        t = as_timesteps(inputs[1].to("cpu"), specs[1].dtype).contiguous()
        with self._lock, torch.no_grad(), self._on_device():
            self._follow_stream()
            results = []
            for start, rows, batch in self._pieces(len(inputs[0])):
                piece = [value[start : start + rows] for value in (inputs[0], t, *inputs[2:])]
                results.append(self._batch(batch).run(piece, rows))
        return results[0] if len(results) == 1 else torch.cat(results)

    def forget_conditions(self) -> None:
        """Recompute what depends on the conditions at the next call."""
        for batch in self._runners.values():
            batch.seen = None

    def _pieces(self, total: int) -> Iterator[tuple[int, int, int]]:
        """(first row, rows, batch size of the plan) for a call of `total` rows."""
        largest = self.batches[-1]
        for start in range(0, total, largest):
            rows = min(largest, total - start)
            yield start, rows, next(b for b in self.batches if b >= rows)

    def _batch(self, batch: int) -> _Batch:
        if batch not in self._runners:
            with torch.inference_mode(False):  # static memory must outlive the caller's inference mode
                self._runners[batch] = self._prepare(batch)
        return self._runners[batch]

    def _prepare(self, batch: int) -> _Batch:
        plan = self.bundle.plans[self.arch, batch]
        memory = Memory(plan, self._tensors, self.device, shared=self._constants)
        keys = self.bundle.keys[self.arch, batch]
        runner = PlanRunner(memory, keys, self.bundle.cubins, self._driver, self._graphs)
        names = placeholders(self.program.graph_module.graph)[: len(self.program.signature.inputs)]
        return _Batch(runner, names, self._time_rows(plan), batch)

    def _time_rows(self, plan: LaunchPlan) -> TimeRows | None:
        if self.program.time is None or not plan.tables:
            return None
        columns = tuple(plan.tables.items())
        if columns not in self._rows:  # plans of other batches have the same
            self._rows[columns] = TimeRows(self.program.time, plan.tables, self.device)
        return self._rows[columns]

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _follow_stream(self) -> None:
        """Wait for the stream of the last call where this one is on another: they use the same memory."""
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != current:
                current.wait_stream(self._stream)
            self._stream = current


@dataclass
class _Batch:
    """A plan with its inputs.

    Attributes:
        runner: executes it.
        names: of the model's inputs in the graph, in order: x, t, conditions.
        time: rows of the time tables, if the plan reads any.
        size: rows of the plan.
        seen: the conditions of the last call.
    """

    runner: PlanRunner
    names: Sequence[str]
    time: TimeRows | None
    size: int
    seen: list[_Seen] | None = field(default=None)

    def run(self, inputs: Sequence[Tensor], rows: int) -> Tensor:
        """Predict for `rows` rows of x, t and conditions; returns a new tensor."""
        conditions = list(inputs[2:])
        seen, self.seen = self.seen, None  # an error on the way leaves nothing to rely on
        changed = seen is None or not all(s.is_still(c) for s, c in zip(seen, conditions, strict=True))
        given = inputs if changed else inputs[:2]
        for name, value in zip(self.names, given, strict=False):
            if name in self.runner.memory.inputs:
                self.runner.memory.inputs[name].copy_(_filled(value, self.size))
        if self.time is not None:
            self.time.write(_filled(inputs[1], self.size), self.runner.memory.inputs[TIME_TABLES])
        result = self.runner.run(changed)[:rows].clone()
        self.seen = [_Seen(value) for value in conditions] if changed else seen
        return result


class _Seen:
    """A condition of an earlier call: tells whether another tensor is the same one with the same contents."""

    def __init__(self, value: Tensor) -> None:
        self._value = value  # kept: its address cannot be given to another tensor
        self._version = _version(value)
        self._copy = value.clone() if _on_host(value) else None

    def is_still(self, value: Tensor) -> bool:
        """Whether `value` is what was seen."""
        if self._copy is not None:
            return _on_host(value) and value.dtype == self._copy.dtype and torch.equal(value, self._copy)
        return self._version is not None and self._version == _version(value) and _place(value) == _place(self._value)


def _on_host(value: Tensor) -> bool:
    return value.device.type == "cpu"


def _version(value: Tensor) -> int | None:
    """How often a tensor has been written to; None for inference tensors, which do not count."""
    return None if value.is_inference() else value._version


def _place(value: Tensor) -> tuple[object, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype, value.device


def _filled(value: Tensor, size: int) -> Tensor:
    """`value` [rows, ...] with its rows repeated up to `size`."""
    rows = value.shape[0]
    return value if rows == size else value.repeat(-(-size // rows), *[1] * (value.dim() - 1))[:size]


def _indexed(device: torch.device) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _no_code(arch: str, bundle: Bundle) -> str:
    held = f"the file has code for {', '.join(bundle.archs)}" if bundle.archs else "the file has no GPU code"
    if arch not in TARGETS:
        return f"this GPU is {arch}, which cannot be compiled for (possible: {', '.join(TARGETS)}); {held}"
    targets = ",".join(a for a in TARGETS if a == arch or a in bundle.archs)
    return f"this GPU is {arch}, but {held}; add its code with: edadm-compile target FILE --targets {targets} -o FILE"
