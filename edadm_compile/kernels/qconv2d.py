"""Integer convolution on channels-last codes: implicit matrix product, weights on M, output pixels on N.

Formula, everything after the accumulators in float32::

    acc   = sum over taps and channels of w * x                      int32, exact
    value = float(acc) * multiplier + bias   [+ float(acc2) * multiplier2 + bias2]
    value += row[image]; value += residual
    out   = activation(value)  or  value * gelu(gate)
    out_q = clamp(rint(out / scale) + zero, QMIN, QMAX)

Roles (see `KERNEL.roles`), strides in elements:
    x: int8 [B, H, W, C], pixels X_STRIDE >= C apart (a multiple of 16), images H * W * X_STRIDE apart. Up to KC - C
        elements behind the channels of the last pixel are read and multiplied by zero weights.
    w: device weight (`constants.weight`), int8 [O_pad, KH * KW * KC], or uint8 of half the width with BITS = 4. O_pad
        is O rounded up to BLOCK_M (more is allowed without GLU).
    multiplier, bias: float32 [O_pad].
    pad: int8 [KC], the code that means zero; needed where a tap can leave the image.
    x2, w2, multiplier2, bias2, pad2: the second segment (SEGMENTS = 2), same geometry with C2, X2_STRIDE, KC2, BITS2.
    row: float32 [B, O], images ROW_STRIDE apart (ROW).
    residual: store type [pixels, O], pixels RES_STRIDE apart (RESIDUAL).
    post: float32 [3] = (scale, zero, 1 / scale) (OUT_Q).
    out: store type [pixels, O], pixels OUT_STRIDE apart; with OUT_NCHW [B, O, OH, OW] contiguous (OUT).
    out_q: int8 [pixels, O], pixels OUT_Q_STRIDE apart (OUT_Q).
    stats: float32 [B, T, 2, O], T = OH * OW / BLOCK_N: mean and sum of squared deviations of each channel of `out`
        before its rounding over each pixel tile (STATS; BLOCK_N divides OH * OW).
    partial: int32 [SPLIT_K, SEGMENTS * (2 if GLU else 1), O_pad, pixels rounded up to BLOCK_N] (SPLIT_K > 1).
    counter: int32 [grid x], zero before and after (SPLIT_K > 1).

Constants: UPSAMPLE 2 reads the input at (h >> 1, w >> 1), H and W are the sizes in memory, the convolution sees twice
as much. ACT: 0 none, 1 SiLU, 2 GELU (erf), 3 GELU (tanh), 4 ReLU. GLU: w, multiplier, bias have O_pad rows of values,
then O_pad rows of gates. EXACT: IEEE division by scale instead of the product with 1 / scale. ASM: int4 unpacking in
inline assembly (not under the interpreter). DOTS: products per K step, 2 of half the depth or (int8) 1. KC and KC2 are
multiples of BLOCK_K; int4 needs BLOCK_K >= 64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edadm_compile.kernels.constants import weight_codes
from edadm_compile.kernels.reference import int_matmul, patches
from edadm_compile.kernels.registry import Kernel, Values, cdiv

#: Constants of the epilogue and of the loop, shared with qlinear.
SHARED: dict[str, int | float | bool] = {
    "ROW": False, "ROW_STRIDE": 0, "RESIDUAL": False, "RES_STRIDE": 0, "ACT": 0, "GLU": False,
    "OUT": True, "OUT_STRIDE": 0, "OUT_NCHW": False, "OUT_Q": False, "OUT_Q_STRIDE": 0, "QMIN": -128, "QMAX": 127,
    "STATS": False, "EXACT": False, "ASM": False, "OVERLAP": False, "DOTS": 2,
}  # fmt: skip
TILE_SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K")


def columns(x: Tensor, pad: Tensor | None, values: Values, channels: int, stride: int) -> Tensor:
    """im2col of one segment: int8 [pixels, KH * KW * channels].

    Args:
        x: the codes; only where they start counts.
        pad: int8 codes that mean zero, or None where no tap leaves the image.
    """
    v = values
    batch = v["pixels"] // (v["OH"] * v["OW"])
    size, pitch = (batch, v["H"], v["W"], channels), (v["H"] * v["W"] * stride, v["W"] * stride, stride, 1)
    image = x.as_strided(size, pitch, x.storage_offset()).permute(0, 3, 1, 2)
    if v["UPSAMPLE"] == 2:
        image = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    below = (v["OH"] - 1) * v["STRIDE_H"] + (v["KH"] - 1) * v["DIL_H"] + 1 - v["PAD_T"] - image.shape[2]
    right = (v["OW"] - 1) * v["STRIDE_W"] + (v["KW"] - 1) * v["DIL_W"] + 1 - v["PAD_L"] - image.shape[3]
    result = patches(
        image,
        (v["KH"], v["KW"]),
        int(pad[0]) if pad is not None else 0,
        (v["STRIDE_H"], v["STRIDE_W"]),
        (v["PAD_T"], below, v["PAD_L"], right),
        (v["DIL_H"], v["DIL_W"]),
    )
    return result.reshape(v["pixels"], -1).contiguous()


def segment(tensors: Mapping[str, Tensor], values: Values, number: str) -> Tensor:
    """float32 ``acc * multiplier + bias`` of one segment ("" or "2"): [pixels, O], with GLU [pixels, 2 * O]."""
    channels, taps = values[f"C{number}"], values["KH"] * values["KW"]
    bits, block, padded = values[f"BITS{number}"], values["BLOCK_K"], values[f"KC{number}"]
    codes = weight_codes(tensors[f"w{number}"].reshape(-1, taps * padded * bits // 8), bits, block)
    rows = codes.reshape(-1, taps, padded)[:, :, :channels].reshape(-1, taps * channels)
    x = columns(tensors[f"x{number}"], tensors.get(f"pad{number}"), values, channels, values[f"X{number}_STRIDE"])
    used = torch.arange(values["O"], device=x.device)
    if values["GLU"]:
        used = torch.cat((used, used + cdiv(values["O"], values["BLOCK_M"]) * values["BLOCK_M"]))
    acc = int_matmul(x, rows[used].contiguous())
    return acc.float() * tensors[f"multiplier{number}"][used] + tensors[f"bias{number}"][used]


def activate(x: Tensor, act: int) -> Tensor:
    """The activation of constant ACT, by the kernel's formulas."""
    if act == 1:
        return x / (1 + torch.exp(-x))
    if act == 3:
        return x / (1 + torch.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return [x, x, x * 0.5 * (1 + torch.erf(x * 0.7071067811865476)), x, x.clamp(min=0)][act]


def finish(value: Tensor, tensors: Mapping[str, Tensor], values: Values, per_image: int) -> None:
    """Everything after the affine step, in place in the output tensors.

    Args:
        value: float32 [pixels, O], with GLU [pixels, 2 * O].
        per_image: pixels of an image.
    """
    count, channels = value.shape[0], values["O"]

    def view(role: str, stride: str) -> Tensor:
        tensor = tensors[role]
        return tensor.as_strided((count, channels), (values[stride], 1), tensor.storage_offset())

    if values["ROW"]:
        row = tensors["row"]
        row = row.as_strided((count // per_image, channels), (values["ROW_STRIDE"], 1), row.storage_offset())
        value = value + row.repeat_interleave(per_image, 0)
    if values["RESIDUAL"]:
        value = value + view("residual", "RES_STRIDE").float()
    gate = value[:, channels:]  # empty without GLU
    value = value[:, :channels] * activate(gate, 2) if values["GLU"] else activate(value, values["ACT"])
    if values["OUT"] and values["OUT_NCHW"]:
        tensors["out"].reshape(-1).copy_(value.reshape(-1, per_image, channels).transpose(1, 2).reshape(-1))
    elif values["OUT"]:
        view("out", "OUT_STRIDE").copy_(value)
    if values["OUT_Q"]:
        scale, zero, inverse = tensors["post"]
        steps = torch.round((value / scale if values["EXACT"] else value * inverse).clamp(-1e6, 1e6))
        view("out_q", "OUT_Q_STRIDE").copy_((steps + zero).clamp(values["QMIN"], values["QMAX"]))
    if values["STATS"]:
        tiles = value.reshape(-1, values["BLOCK_N"], channels)
        mean = tiles.mean(dim=1)
        deviations = (tiles - mean[:, None]).square().sum(dim=1)
        tensors["stats"].reshape(-1).copy_(torch.stack((mean, deviations), dim=1).reshape(-1))


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch; split-K changes nothing and is ignored."""
    value = segment(tensors, values, "")
    if values["SEGMENTS"] == 2:
        value = value + segment(tensors, values, "2")
    finish(value, tensors, values, values["OH"] * values["OW"])


def grid(values: Values) -> tuple[int, int, int]:
    """Tiles of channels x pixels, 1, splits of K."""
    return cdiv(values["O"], values["BLOCK_M"]) * cdiv(values["pixels"], values["BLOCK_N"]), 1, values["SPLIT_K"]


KERNEL = Kernel(
    name="qconv2d",
    roles=(
        "x", "w", "multiplier", "bias", "pad", "x2", "w2", "multiplier2", "bias2", "pad2",
        "row", "residual", "post", "out", "out_q", "stats", "partial", "counter",
    ),
    scalars=("pixels",),
    constants={
        "H": 0, "W": 0, "C": 0, "X_STRIDE": 0, "KH": 1, "KW": 1, "STRIDE_H": 1, "STRIDE_W": 1, "PAD_T": 0, "PAD_L": 0,
        "DIL_H": 1, "DIL_W": 1, "UPSAMPLE": 1, "OH": 0, "OW": 0, "O": 0, "KC": 0, "BITS": 8,
        "SEGMENTS": 1, "C2": 0, "X2_STRIDE": 0, "KC2": 0, "BITS2": 8, **SHARED,
    },
    sizes=TILE_SIZES,
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.qconv2d:qconv2d",
)  # fmt: skip
