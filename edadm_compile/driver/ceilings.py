"""What a machine can do at most, measured: copy bandwidth, matrix products, the gap between launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edadm_compile.driver import synthetic
from edadm_compile.driver.single_launch import Runner, fill
from edadm_compile.errors import TargetError
from edadm_compile.kernels.memory import Memory

#: Side of the square products, and bytes of the copy.
SIDE, COPY = 8192, 1 << 31
_ROUNDS = 5


def measure(runner: Runner, arch: str, side: int = SIDE, copy: int = COPY) -> dict[str, Any]:
    """All ceilings of a device.

    Args:
        runner: of the device.
        arch: of our kernels.
        side: of the square matrix products.
        copy: bytes of the buffer that is copied.

    Returns:
        copy_bytes_per_second (read and written), bf16_ and int8_operations_per_second with what reached the latter,
        int8_candidates by name.
    """
    candidates = {"our qlinear": _own(runner, arch, side), "torch._int_mm": _int_mm(runner, side)}
    known = {name: rate for name, rate in candidates.items() if rate is not None}
    best = max(known, key=lambda name: known[name])
    return {
        "copy_bytes_per_second": _copy(runner, copy),
        "bf16_operations_per_second": _product(runner, side, torch.bfloat16),
        "fp16_operations_per_second": _product(runner, side, torch.float16),
        "int8_operations_per_second": known[best],
        "int8_reached_by": best,
        "int8_candidates": candidates,
        "side": side,
    }


def _seconds(runner: Runner, call: Callable[[], object]) -> float:
    return runner.time({"": call}, _ROUNDS)[""].median / 1e6


def _copy(runner: Runner, size: int) -> float:
    """The driver's copy, or a kernel that reads and writes the same bytes where that is faster."""
    source = torch.randint(0, 1 << 30, (size // 4,), dtype=torch.int32, device=runner.device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * size / min(_seconds(runner, way) for way in ways)


def _product(runner: Runner, side: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(side, side, device=runner.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * side**3 / _seconds(runner, lambda: torch.mm(a, b, out=out))


def _int_mm(runner: Runner, side: int) -> float | None:
    a, b = (_codes(side, runner.device) for _ in range(2))
    try:
        return 2.0 * side**3 / _seconds(runner, lambda: torch._int_mm(a, b.T))
    except RuntimeError:  # not on every device
        return None


def _codes(side: int, device: torch.device) -> Tensor:
    return torch.randint(-128, 128, (side, side), device=device, dtype=torch.int16).to(torch.int8)


def _own(runner: Runner, arch: str, side: int) -> float | None:
    """Our own integer product with the tile that is chosen for it."""
    made = synthetic.linear(synthetic.Settings(arch), side, side, side)
    try:
        if runner.prepare([made.plan]):
            return None
    except TargetError:
        return None
    memory = Memory(made.plan, made.tensors.__getitem__, runner.device)
    fill(memory)
    return 2.0 * side**3 / _seconds(runner, runner.bind(memory))


def launch_gap(clock: Callable[[Callable[[], object], int], float], device: torch.device, nodes: int = 300) -> float:
    """Microseconds per node of a CUDA graph of `nodes` kernels that do nothing.

    Args:
        clock: microseconds of one replay of a graph of (call, repetitions).
    """
    cell = torch.zeros(1, device=device)
    return clock(lambda: cell.add_(0), nodes) / nodes
