"""Engines: what executes a lowered program."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from edadm_compile.errors import InputError, TargetError
from edadm_compile.runtime.artifact import Artifact
from edadm_compile.runtime.engines.reference import ReferenceEngine

#: Engines by the device type they run on; the first is the default.
ENGINES = {"cpu": ("reference",), "cuda": ("cuda",)}


class Engine(Protocol):
    """Runs a program on x [B, C, H, W], t [B] and conditions."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The predicted noise, float32."""


def make_engine(name: str | None, device: str, artifact: Artifact) -> Engine:
    """The engine called `name` for `device`; None for the device's default.

    Raises:
        InputError: an unknown device, or an engine that does not run on it.
        TargetError: no CUDA here, or no code for this GPU in the file.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = device
    if kind not in ENGINES:
        raise InputError(f"device: got {device!r}, allowed {', '.join(ENGINES)}")
    if name is not None and name not in ENGINES[kind]:
        raise InputError(f"engine: got {name!r}, on {kind} allowed {', '.join(ENGINES[kind])}")
    if kind == "cpu":
        return ReferenceEngine(artifact.lowered)
    if not torch.cuda.is_available():
        raise TargetError(f"device {device!r}: torch finds no CUDA GPU here; load with device='cpu'")
    if artifact.device is None:
        raise TargetError(
            "the file has no GPU code; add it with: edadm-compile target FILE --targets sm_XX -o FILE (see --help)"
        )
    from edadm_compile.runtime.engines.cuda import CudaEngine

    return CudaEngine(artifact.lowered, artifact.device, device=device)
