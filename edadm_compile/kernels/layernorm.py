"""LayerNorm and quantization in one launch.

x is [rows, C] with row stride X_STRIDE; v = (x - mean) / sqrt(var + EPS) * weight + bias in float32, weight and bias
float32 [C] or absent. `out` receives v in the store type, `out_q` clamp(rint(v / scale) + zero_point, QMIN, QMAX) as int8.
A row is held in registers: BLOCK_C is the power of two that holds C.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.quantize import write_codes
from edadm_compile.kernels.registry import Kernel, Values, cdiv


def grid(values: Values) -> tuple[int, int, int]:
    """Blocks of rows."""
    return cdiv(values["rows"], values["BLOCK_R"]), 1, 1


def choose(values: Values) -> Tile:
    """A sensible tile: about 2048 elements per program, one warp per 1024 of them."""
    block_c = max(16, 1 << (values["C"] - 1).bit_length())
    block_r = max(1, min(16, 2048 // block_c))
    warps = max(1, min(8, block_r * block_c // 512))
    return Tile({"BLOCK_R": block_r, "BLOCK_C": block_c}, num_warps=warps, num_stages=1)


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch, in place."""
    x = tensors["x"].float().reshape(values["rows"], values["C"])
    weight = tensors["weight"] if values["HAS_WEIGHT"] else None
    bias = tensors["bias"] if values["HAS_BIAS"] else None
    result = torch.nn.functional.layer_norm(x, (values["C"],), weight, bias, float(values["EPS"]))
    if values["OUT"]:
        tensors["out"].copy_(result.reshape(tensors["out"].shape))
    if values["OUT_Q"]:
        write_codes(tensors["out_q"], result, tensors["post"], values)


_CONSTANTS: dict[str, Any] = {
    "C": 0, "X_STRIDE": 0, "EPS": 1e-5, "HAS_WEIGHT": True, "HAS_BIAS": True, "OUT": False, "OUT_STRIDE": 0,
    "OUT_Q": True, "OUT_Q_STRIDE": 0, "QMIN": -128, "QMAX": 127, "EXACT": False, "ASM": False, "OVERLAP": False,
}  # fmt: skip

KERNEL = Kernel(
    name="layernorm",
    roles=("x", "weight", "bias", "post", "out", "out_q"),
    scalars=("rows",),
    constants=_CONSTANTS,
    sizes=("BLOCK_R", "BLOCK_C"),
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.layernorm:layernorm",
)
