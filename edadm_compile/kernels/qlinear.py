"""Integer linear layer: rows of codes times weights; the convolution of one-pixel images.

Formula, roles and constants as in `edadm_compile.kernels.qconv2d`, with these differences:
    x: int8 [rows, C], rows X_STRIDE apart (a multiple of 16); no pad, pad2 and no spatial constants.
    rows: the scalar in place of `pixels`; ROWS_PER_IMAGE of them share one `row` and make up one image of `stats`
        (float32 [B, ROWS_PER_IMAGE / BLOCK_N, 2, O]) and of OUT_NCHW ([B, O, ROWS_PER_IMAGE]).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from edadm_compile.kernels import qconv2d
from edadm_compile.kernels.registry import Kernel, Values, cdiv

_ONES = ("H", "W", "OH", "OW", "KH", "KW", "STRIDE_H", "STRIDE_W", "DIL_H", "DIL_W", "UPSAMPLE")


def as_convolution(values: Values) -> dict[str, Any]:
    """Values of the convolution of one-pixel images that a linear layer is."""
    return {**values, **dict.fromkeys(_ONES, 1), "PAD_T": 0, "PAD_L": 0, "pixels": values["rows"]}


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch; split-K changes nothing and is ignored."""
    spatial = as_convolution(values)
    value = qconv2d.segment(tensors, spatial, "")
    if values["SEGMENTS"] == 2:
        value = value + qconv2d.segment(tensors, spatial, "2")
    qconv2d.finish(value, tensors, values, values["ROWS_PER_IMAGE"])


def grid(values: Values) -> tuple[int, int, int]:
    """Tiles of channels x rows, 1, splits of K."""
    return cdiv(values["O"], values["BLOCK_M"]) * cdiv(values["rows"], values["BLOCK_N"]), 1, values["SPLIT_K"]


KERNEL = Kernel(
    name="qlinear",
    roles=tuple(role for role in qconv2d.KERNEL.roles if not role.startswith("pad")),
    scalars=("rows",),
    constants={
        "C": 0, "X_STRIDE": 0, "O": 0, "KC": 0, "BITS": 8, "SEGMENTS": 1, "C2": 0, "X2_STRIDE": 0, "KC2": 0,
        "BITS2": 8, "ROWS_PER_IMAGE": 1, **qconv2d.SHARED,
    },
    sizes=qconv2d.TILE_SIZES,
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.qlinear:qlinear",
)  # fmt: skip
