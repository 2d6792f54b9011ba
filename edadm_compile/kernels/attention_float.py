"""softmax(scale * q kᵀ) v on floating-point q, k, v: for programs whose attention products stay float.

q [B, LQ, HEADS, D], k and v [B, LK, HEADS, D] in the store type, each with its own strides (Q_BATCH, Q_ROW, Q_HEAD, ...),
the last dimension contiguous. Products and sums in float32, probabilities in the store type, online softmax: one pass.
`out` [B, LQ, HEADS * D] receives the result in the store type (row stride OUT_STRIDE), `out_q` its codes (post, QMIN,
QMAX, row stride OUT_Q_STRIDE): one launch where the library needs three (product, copy, quantize).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.attention import MAX_HEAD, grid
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.quantize import write_codes
from edadm_compile.kernels.registry import Kernel, Values, cdiv

__all__ = ["KERNEL", "MAX_HEAD", "choose", "reference"]

#: Programs that fill a large GPU.
_FULL = 132


def choose(values: Values) -> Tile:
    """A sensible tile: smaller blocks of queries while the GPU is not full."""
    block_d = max(16, 1 << (values["D"] - 1).bit_length())
    programs = cdiv(values["LQ"], 64) * values["HEADS"] * values["batch"]
    few = 16 if programs < _FULL // 2 or values["LQ"] <= 16 else 32 if programs < _FULL or values["LQ"] <= 32 else 0
    if few:  # a program is a chain of steps whatever its height: more of them, of fewer keys blocks
        warps = 8 if few == 32 and block_d >= 256 else 4
        return Tile({"BLOCK_Q": few, "BLOCK_KV": 32 if values["LK"] <= 32 else 64}, num_warps=warps, num_stages=2)
    ragged = block_d == 128 and values["LK"] % 64  # masks take the registers that a wider block would need
    block_kv = 32 if block_d >= 256 or ragged or values["LK"] <= 32 else 64
    block_q, warps = (64, 4) if block_d < 256 else (64, 8)
    if block_d <= 64 and cdiv(values["LQ"], 128) * values["HEADS"] * values["batch"] >= 264:
        block_q = 128
    return Tile({"BLOCK_Q": block_q, "BLOCK_KV": block_kv}, num_warps=warps, num_stages=2)


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch, in place: the library operator in float32, as in the reference engine."""
    q, k, v = (tensors[name].permute(0, 2, 1, 3).float().contiguous() for name in ("q", "k", "v"))
    result = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=values["SCALE"]).permute(0, 2, 1, 3)
    if values["OUT"]:
        tensors["out"].copy_(result.reshape(tensors["out"].shape))
    if values["OUT_Q"]:
        write_codes(tensors["out_q"], result, tensors["post"], values)


_CONSTANTS: dict[str, Any] = {
    "LQ": 0, "LK": 0, "HEADS": 0, "D": 0, "Q_BATCH": 0, "Q_ROW": 0, "Q_HEAD": 0, "K_BATCH": 0, "K_ROW": 0, "K_HEAD": 0,
    "V_BATCH": 0, "V_ROW": 0, "V_HEAD": 0, "SCALE": 1.0, "OUT": True, "OUT_STRIDE": 0, "OUT_Q": False,
    "OUT_Q_STRIDE": 0, "QMIN": -128, "QMAX": 127, "EXACT": False, "ASM": False, "OVERLAP": False,
}  # fmt: skip

KERNEL = Kernel(
    name="attention_float",
    roles=("q", "k", "v", "post", "out", "out_q"),
    scalars=("batch",),
    constants=_CONSTANTS,
    sizes=("BLOCK_Q", "BLOCK_KV"),
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.attention_float:attention_float",
)
