"""One small kernel compiled for real, to see whether the compiler works on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from edadm_compile.kernels.aot import compile_plans
from edadm_compile.kernels.cubin import Cubin
from edadm_compile.kernels.launch import Launch, LaunchPlan, Operand, Tile

_PIXELS, _CHANNELS = 64, 16


def compile_one(arch: str) -> Cubin:
    """Compile a copy of [1, 64, 16] float32 values for an architecture; nothing comes from a cache.

    Raises:
        TargetError: Triton is missing, or its compiler or ptxas fails; the message has its last words.
    """
    operands = {
        role: Operand("arena", key, torch.float32, (1, _PIXELS, _CHANNELS), (_PIXELS * _CHANNELS, _CHANNELS, 1))
        for key, role in enumerate(("x", "out"))
    }
    constants = {
        "X_BATCH": _PIXELS * _CHANNELS, "X_PIXEL": _CHANNELS, "HW": _PIXELS, "C": _CHANNELS, "OUT": True,
        "OUT_STRIDE": _CHANNELS, "OUT_Q": False,
    }  # fmt: skip
    tile = Tile({"BLOCK_P": 32, "BLOCK_C": _CHANNELS}, num_warps=1, num_stages=1)
    launch = Launch("quantize", "trial", operands, constants, {"batch": 1}, tile)
    plan = LaunchPlan(arch, 1, torch.float16, (launch,), (), 0, {}, 0, {}, ())
    with tempfile.TemporaryDirectory(prefix="edadm-trial-") as folder:
        (cubin,) = compile_plans([plan], jobs=1, cache=Path(folder)).values()
    return cubin
