"""Elementwise: optional activation, store-type copy, quantization.

x is [B, HW, C] with any strides (X_BATCH, X_PIXEL, X_CHANNEL elements), so that the NCHW input of a model and an NHWC
intermediate are the same case. v = act(x) in float32. `out` [B, HW, C] receives v in the store type. `out_q` receives
int8 codes clamp(rint(v / scale) + zero_point, QMIN, QMAX); its pixel stride may exceed C, the channels between are
written as 0. With TERMS = 2 the codes have 16 bits and are split like `affine.split_hi_lo`: high bytes to `out_q`, low
ones to `out_q_lo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import Kernel, Values, cdiv
from edadm_compile.quant import affine


def activation(v: Tensor, act: int) -> Tensor:
    """float32 activation by its constant: 0 none, 1 SiLU, 2 GELU (erf), 3 GELU (tanh), 4 ReLU.

    Raises:
        ValueError: unknown constant.
    """
    nn = torch.nn.functional
    if act == 0:
        return v
    if act == 1:
        return nn.silu(v)
    if act in (2, 3):
        return nn.gelu(v, approximate="tanh" if act == 3 else "none")
    if act == 4:
        return nn.relu(v)
    raise ValueError(f"activation {act} is not one of 0 to 4")


def codes(v: Tensor, post: Tensor, values: Values) -> Tensor:
    """float32 codes of float32 `v`; `post` is (scale, zero_point, 1 / scale)."""
    return affine.quantize(v, post[0], post[1], values["QMIN"], values["QMAX"])


def write_codes(out_q: Tensor, v: Tensor, post: Tensor, values: Values) -> None:
    """Quantize `v` into `out_q` in place: same elements in the same order, any strides."""
    out_q.copy_(codes(v, post, values).reshape(out_q.shape))


def grid(values: Values) -> tuple[int, int, int]:
    """(pixel blocks, channel blocks, images)."""
    return cdiv(values["HW"], values["BLOCK_P"]), cdiv(_channels(values), values["BLOCK_C"]), values["batch"]


def _channels(values: Values) -> int:
    """Channels written: the padding of the codes counts."""
    return int(max(values["C"], values["OUT_Q_STRIDE"] if values["OUT_Q"] else 0))


def choose(values: Values) -> Tile:
    """A sensible tile: 2048 elements, at most 64 channels wide, 4 warps; small launches get smaller tiles."""
    block_c = min(64, 1 << (_channels(values) - 1).bit_length())
    elements = values["HW"] * _channels(values) * values["batch"]
    size = 2048 if elements >= 2048 * 256 else 512
    block_p = max(1, min(size // block_c, 1 << (values["HW"] - 1).bit_length()))
    warps = max(1, min(4, block_p * block_c // 256))
    return Tile({"BLOCK_P": block_p, "BLOCK_C": block_c}, num_warps=warps, num_stages=1)


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch, in place. The code operands cover the padding channels: [B, HW, OUT_Q_STRIDE] or [B, HW, C]."""
    v = activation(tensors["x"].float(), values["ACT"]).reshape(values["batch"], values["HW"], values["C"])
    if values["OUT"]:
        tensors["out"].copy_(v.reshape(tensors["out"].shape))
    if not values["OUT_Q"]:
        return
    code = codes(v, tensors["post"], values)
    terms = affine.split_hi_lo(code.to(torch.int16)) if values["TERMS"] == 2 else (code.to(torch.int8),)
    for role, term in zip(("out_q", "out_q_lo"), terms, strict=False):
        out = tensors[role]
        whole = out.as_strided((values["batch"], values["HW"], values["OUT_Q_STRIDE"]), _dense(values))
        whole.zero_()
        whole[..., : values["C"]].copy_(term)


def _dense(values: Values) -> tuple[int, int, int]:
    """Strides of the code buffer."""
    return values["HW"] * values["OUT_Q_STRIDE"], values["OUT_Q_STRIDE"], 1


_CONSTANTS: dict[str, Any] = {
    "X_BATCH": 0, "X_PIXEL": 0, "X_CHANNEL": 1, "HW": 0, "C": 0, "ACT": 0, "OUT": False, "OUT_STRIDE": 0, "OUT_Q": True,
    "OUT_Q_STRIDE": 0, "TERMS": 1, "QMIN": -128, "QMAX": 127, "EXACT": False, "ASM": False, "OVERLAP": False,
}  # fmt: skip

KERNEL = Kernel(
    name="quantize",
    roles=("x", "post", "out", "out_q", "out_q_lo"),
    scalars=("batch",),
    constants=_CONSTANTS,
    sizes=("BLOCK_P", "BLOCK_C"),
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.quantize:quantize",
)
