"""Engines: what executes a lowered program."""

from __future__ import annotations

import sys
import warnings
from typing import Protocol

import torch
from torch import Tensor

from edadm_compile.errors import EdadmError, InputError, TargetError
from edadm_compile.runtime.artifact import Artifact
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from edadm_compile.runtime.engines.reference import ReferenceEngine
from edadm_compile.runtime.running import running

#: Engines by the device type they run on; the first is the default.
ENGINES = {"cpu": ("onnxruntime", "reference"), "cuda": ("cuda",)}


class Engine(Protocol):
    """Runs a program on x [B, C, H, W], t [B] and conditions."""

    name: str

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The predicted noise, float32."""


def make_engine(name: str | None, device: str, artifact: Artifact) -> Engine:
    """The engine called `name` for `device`; None for the device's default.

    Where ONNX Runtime is not installed, or cannot run the file, the CPU's default is the reference engine, with a warning.

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
        return _cpu_engine(name, artifact)
    if not torch.cuda.is_available():
        raise TargetError(f"device {device!r}: torch finds no CUDA GPU here; load with device='cpu'")
    if artifact.others:
        raise TargetError(
            f"the file has programs for {len(artifact.shapes)} shapes and so no GPU code; compile a file of one shape for "
            "the GPU, or load with device='cpu'"
        )
    if artifact.device is None:
        raise TargetError(
            "the file has no GPU code; add it with: edadm-compile target FILE --targets sm_XX -o FILE (see --help)"
        )
    from edadm_compile.runtime.engines.cuda import CudaEngine

    return CudaEngine(artifact.lowered, artifact.device, device=device)


def _cpu_engine(name: str | None, artifact: Artifact) -> Engine:
    if name == "reference":
        return ReferenceEngine(artifact.lowered)
    try:
        with running("the program has no form for ONNX Runtime"):
            return OnnxRuntimeEngine(artifact.qdq)
    except EdadmError as error:
        if name is not None:
            raise
        warnings.warn(f"running on the slow reference engine: {error}", RuntimeWarning, stacklevel=_callers_level())
        return ReferenceEngine(artifact.lowered)


def _callers_level() -> int:
    """Stack level, as `warnings.warn` counts from our caller, of the first frame outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("edadm_compile."):
        level, frame = level + 1, frame.f_back
    return level
