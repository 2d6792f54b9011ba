"""softmax(q kᵀ) v on int8 codes with static scales.

q [B, LQ, HEADS, D], k and v [B, LK, HEADS, D] int8, each with its own strides (Q_BATCH, Q_ROW, Q_HEAD, ...), the last
dimension contiguous. params float32 [7] = (qk_scale, zero_q, zero_k, s_v, zero_v, s_p, zero_p) with
qk_scale = s_q * s_k * softmax scale > 0. Scores are float(sum (q - zero_q)(k - zero_k)) * qk_scale.

P_CODES = True   p = clamp(rint(softmax / s_p) + zero_p, PMIN, PMAX) of the normalised probabilities, multiplied in int8:
                 result = s_p * s_v * sum (p - zero_p)(v - zero_v), accumulated exactly in int32. Two passes over the keys.
P_CODES = False  probabilities in float16, not normalised before the product (online softmax), values as the float16
                 numbers v - zero_v (exact); s_p and zero_p are not used. One pass.

`out` [B, LQ, HEADS * D] receives the result in the store type (row stride OUT_STRIDE), `out_q` its codes (post, QMIN,
QMAX, row stride OUT_Q_STRIDE). ZERO_Q, ZERO_K, ZERO_V = False promise that the zero point is 0 and save its correction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.quantize import write_codes
from edadm_compile.kernels.reference import matmul_accumulator
from edadm_compile.kernels.registry import Kernel, Values, cdiv
from edadm_compile.quant import affine

#: Head sizes the kernel is made for: sums of products stay exact in float32 up to 256.
MAX_HEAD = 256
#: Programs below which most of a large GPU is idle.
_WAVE = 132


def grid(values: Values) -> tuple[int, int, int]:
    """(blocks of queries, heads, images)."""
    return cdiv(values["LQ"], values["BLOCK_Q"]), values["HEADS"], values["batch"]


def choose(values: Values) -> Tile:
    """A sensible tile: smaller blocks of queries while the GPU is not full."""
    block_d = max(32, 1 << (values["D"] - 1).bit_length())
    block_q, block_kv, warps = 64, 64, 4 if block_d < 256 and not values["P_CODES"] else 8
    if block_d <= 64 and cdiv(values["LQ"], 128) * values["HEADS"] * values["batch"] >= _WAVE:
        block_q, warps = 128, 8
    elif values["LQ"] <= 32:
        block_q, warps = 32, 4
    if block_d == 256 or values["LK"] <= 32:
        block_kv = 32
    return Tile({"BLOCK_Q": block_q, "BLOCK_KV": block_kv}, num_warps=warps, num_stages=2)


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch, in place: integer scores, float32 softmax, quantized probabilities, integer product.

    With P_CODES = False the probabilities stay float32.
    """
    params = tensors["params"]
    zero_q, zero_k, zero_v, zero_p = (int(params[i]) for i in (1, 2, 4, 6))
    q, k, v = (tensors[name].permute(0, 2, 1, 3) for name in ("q", "k", "v"))  # [B, HEADS, L, D]
    scores = matmul_accumulator(q, k.transpose(-2, -1), zero_q, zero_k).float() * params[0]
    p = torch.softmax(scores, -1)
    if values["P_CODES"]:
        codes = affine.quantize(p, params[5], params[6], values["PMIN"], values["PMAX"])
        result = matmul_accumulator(codes, v, zero_p, zero_v).float() * (params[5] * params[3])
    else:
        result = p @ affine.dequantize(v.float(), params[3], params[4])
    result = result.permute(0, 2, 1, 3)
    if values["OUT"]:
        tensors["out"].copy_(result.reshape(tensors["out"].shape))
    if values["OUT_Q"]:
        write_codes(tensors["out_q"], result, tensors["post"], values)


_CONSTANTS: dict[str, Any] = {
    "LQ": 0, "LK": 0, "HEADS": 0, "D": 0, "Q_BATCH": 0, "Q_ROW": 0, "Q_HEAD": 0, "K_BATCH": 0, "K_ROW": 0, "K_HEAD": 0,
    "V_BATCH": 0, "V_ROW": 0, "V_HEAD": 0, "ZERO_Q": True, "ZERO_K": True, "ZERO_V": True, "P_CODES": False,
    "PMIN": -128, "PMAX": 127, "OUT": True, "OUT_STRIDE": 0, "OUT_Q": False, "OUT_Q_STRIDE": 0, "QMIN": -128,
    "QMAX": 127, "EXACT": False, "ASM": False, "OVERLAP": False,
}  # fmt: skip

KERNEL = Kernel(
    name="attention",
    roles=("q", "k", "v", "params", "post", "out", "out_q"),
    scalars=("batch",),
    constants=_CONSTANTS,
    sizes=("BLOCK_Q", "BLOCK_KV"),
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.attention:attention",
)
