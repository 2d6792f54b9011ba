"""Engines: what executes a lowered program."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.runtime.artifact import Artifact
from edadm_compile.runtime.engines.reference import ReferenceEngine

ENGINES = ("reference",)


class Engine(Protocol):
    """Runs a program on x [B, C, H, W], t [B] and conditions."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The predicted noise, float32."""


def make_engine(name: str, device: str, artifact: Artifact) -> Engine:
    """The engine called `name` for `device`.

    Raises:
        InputError: unknown engine, or a device no engine here runs on.
    """
    if name not in ENGINES:
        raise InputError(f"engine: got {name!r}, allowed {', '.join(ENGINES)}")
    if device != "cpu":
        raise InputError(
            f"device: got {device!r}; this version runs compiled programs on 'cpu' only (no CUDA engine yet)"
        )
    return ReferenceEngine(artifact.lowered)
