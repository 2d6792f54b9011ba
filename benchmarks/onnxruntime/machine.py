"""What a measurement ran on, and who else used the processor meanwhile."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edadm_compile.driver.machine import Cpu, describe_machine

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "onnx-ir", "diffusers", "numpy")
#: Instructions that decide how fast eight bits are.
_FLAGS = {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16"}
#: Above this load average, or with this many cores busy for others, times are not to be trusted.
QUIET_LOAD, QUIET_CORES = 0.3, 0.1


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, versions and commit; the commit ends in "+dirty" when files differ from it."""
    found = describe_machine(Cpu())
    status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    changed = subprocess.run(status, cwd=_ROOT, capture_output=True, text=True, check=False).stdout.strip()
    if found["commit"] and changed:
        found["commit"] += "+dirty"
    return {**found, "instructions": _instructions(), "versions": {name: version(name) for name in _PACKAGES}}


def _instructions() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return sorted(_FLAGS & set(flags))


@dataclass(frozen=True)
class Usage:
    """Seconds of processor time since some start.

    Attributes:
        wall: of the clock.
        all: in use by anyone on this machine.
        own: in use by this process and its children.
        stolen: taken by the host of a virtual machine.
    """

    wall: float
    all: float
    own: float
    stolen: float

    @staticmethod
    def now() -> Usage | None:
        """None where the system does not tell."""
        try:
            fields = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _wait, interrupt, soft, stolen = fields[:8]
        return Usage(
            time.monotonic(), (user + nice + system + interrupt + soft) / tick, sum(os.times()[:4]), stolen / tick
        )

    def until(self, later: Usage) -> dict[str, float]:
        """Cores that others used, and that the host took, on average between two moments."""
        wall = max(later.wall - self.wall, 1e-9)
        foreign = (later.all - self.all) - (later.own - self.own)
        return {"foreign_cores": max(0.0, foreign) / wall, "stolen_cores": (later.stolen - self.stolen) / wall}


def between(before: Usage | None) -> dict[str, float]:
    """Use by others since then; empty where the system does not tell."""
    after = Usage.now()
    return {} if before is None or after is None else before.until(after)


def idle(seconds: float = 2.0) -> dict[str, float]:
    """Use by others while this process does nothing."""
    before = Usage.now()
    time.sleep(seconds)
    return between(before)
