"""The reference engine: runs the lowered graph node by node in torch; its results define what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_compile.ir.program import Program
from edadm_compile.kernels import reference as _kernels  # registers the CPU kernels  # noqa: F401


class ReferenceEngine:
    """Executes a lowered program on the CPU from its integer weights."""

    name = "reference"

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Predict the noise for x [B, C, H, W], t [B], conditions; float32."""
        with torch.no_grad():
            return self.program(*inputs)
