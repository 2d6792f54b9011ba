"""What a measurement ran on, and how its device is watched."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

import edadm_compile
from edadm_compile.errors import InputError, TargetError
from edadm_compile.evaluate.timing import Clock, EventClock, WallClock
from edadm_compile.kernels.request import triton_version

T = TypeVar("T")


class Device(Protocol):
    """Where contenders run.

    Attributes:
        kind: "cpu" or "cuda".
        clock: times calls.
    """

    kind: str
    clock: Clock

    def wait(self) -> None:
        """Until all work is done."""

    def watched(self, function: Callable[[], T]) -> tuple[T, int, int]:
        """A result, the bytes allocated at the peak above the start, and those still held afterwards."""


@dataclass
class Cpu:
    """The processor; its memory is not watched."""

    kind: str = "cpu"
    clock: Clock = field(default_factory=WallClock)

    def wait(self) -> None:
        """Nothing is ever under way."""

    def watched(self, function: Callable[[], T]) -> tuple[T, int, int]:
        """Without memory figures."""
        return function(), 0, 0


@dataclass
class Gpu:
    """A CUDA device through torch's allocator, which every contender uses."""

    kind: str = "cuda"
    clock: Clock = field(default_factory=EventClock)

    def wait(self) -> None:
        """As `Device.wait`."""
        torch.cuda.synchronize()

    def watched(self, function: Callable[[], T]) -> tuple[T, int, int]:
        """As `Device.watched`."""
        self.wait()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        self.wait()
        return result, torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start


def pick_device(name: str | None) -> Device:
    """The device an option names; None for the GPU where there is one.

    Raises:
        InputError: another name.
        TargetError: "cuda" without a GPU.
    """
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device: got {name!r}, allowed cpu, cuda")
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise TargetError("--device cuda: torch finds no CUDA GPU here; use --device cpu")
    if name == "cpu" or not present:
        return Cpu()
    torch.zeros(1, device="cuda")  # the context is nobody's cold start
    return Gpu()


def describe_machine(device: Device) -> dict[str, Any]:
    """Processor, GPU, versions, commit."""
    try:
        triton: str | None = triton_version()
    except TargetError:
        triton = None
    gpu = {}
    if device.kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), **gpu,
        "python": platform.python_version(), "torch": torch.__version__, "triton": triton,
        "edadm_compile": edadm_compile.__version__, "commit": _commit(),
    }  # fmt: skip


def processor() -> str:
    """Model name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the checkout the package lies in; None for an installed package."""
    here = Path(edadm_compile.__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
