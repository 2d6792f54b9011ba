"""GroupNorm, optional activation and quantization in one launch.

x is [B, HW, C] with pixel stride X_STRIDE; with C2 > 0 the input is the concatenation of x and x2 along channels, which
is never written. v = act((x - mean_g) / sqrt(var_g + EPS) * weight + bias) in float32; `out` receives v in the store type,
`out_q` receives clamp(rint(v / scale) + zero_point, QMIN, QMAX) as int8, both [B, HW, C + C2] with their pixel strides.

Statistics come from one of two places:
  T = 0  the kernel computes them: one program per image and BLOCK_G whole groups. BLOCK_C >= BLOCK_G * channels per group.
         With BLOCK_P >= HW the data is read once.
  T > 0  the producer of x gives them: stats float32 [B, T, 2, C], (mean, M2) of HW / T pixels each, and stats2
         [B, T2, 2, C2] for x2. Programs take BLOCK_P * STEPS pixels of BLOCK_C channels; BLOCK_G is the number of groups
         a block of channels can touch.
  MOMENTS = True  writes `stats` of x for such launches instead of normalising (for an x whose producer gave none): one
         program per part of HW / T pixels and BLOCK_C channels; of the operands only x and stats are used.
x and x2 have the same type. EPS, weight, bias, statistics, post are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.quantize import activation, write_codes
from edadm_compile.kernels.registry import Kernel, Values, cdiv

#: Programs below which most of a large GPU is idle.
_WAVE = 132
#: Blocks of pixels in a row that one program takes at most.
_MOST_STEPS = 32


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def grid(values: Values) -> tuple[int, int, int]:
    """(pixel blocks, channel blocks, images)."""
    if values["MOMENTS"]:
        return values["T"], cdiv(values["C"], values["BLOCK_C"]), values["batch"]
    if values["T"] == 0:
        return 1, cdiv(values["GROUPS"], values["BLOCK_G"]), values["batch"]
    blocks = cdiv(values["C"], values["BLOCK_C"]) + cdiv(values["C2"], values["BLOCK_C"])
    return cdiv(values["HW"], values["BLOCK_P"] * values["STEPS"]), blocks, values["batch"]


def touched_groups(channels: int, channels2: int, groups: int, block: int) -> int:
    """The largest number of groups that one block of `block` channels of one source touches."""
    per_group, most = (channels + channels2) // groups, 1
    for start, size in ((0, channels), (channels, channels2)):
        for first in range(start, start + size, block):
            last = min(first + block, start + size) - 1
            most = max(most, last // per_group - first // per_group + 1)
    return most


def choose(values: Values) -> Tile:
    """A sensible tile for the constants (defaults filled in) and the batch in `values`."""
    if values["MOMENTS"]:
        block_c = min(64, _next_power_of_2(values["C"]))
        block_p = min(64, _next_power_of_2(values["HW"] // values["T"]))
        return Tile({"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_G": 1, "STEPS": 1}, num_warps=4, num_stages=1)
    return _choose_given(values) if values["T"] else _choose_own(values)


def parts(pixels: int) -> int:
    """A good T for MOMENTS: 32 to 128 pixels in a part; 0 if one program should read all pixels of its groups."""
    if pixels < 1024:
        return 0
    return next((t for t in range(cdiv(pixels, 128), pixels // 32 + 1) if pixels % t == 0), 0)


def _choose_given(values: Values) -> Tile:
    hw, c, c2 = values["HW"], values["C"], values["C2"]
    sources = [n for n in (c, c2) if n]
    fits = [n for n in (128, 64, 32) if all(s % n == 0 for s in sources)]
    block_c = fits[0] if fits else min(64, _next_power_of_2(max(sources)))
    block_p = max(1, min(_next_power_of_2(hw), 4096 // block_c))
    # every program reads T partials of all groups it touches, often more than a block of pixels: as many blocks in a
    # row as leave two programs for each multiprocessor
    blocks = sum(cdiv(s, block_c) for s in sources) * values["batch"]
    steps = max(1, min(_MOST_STEPS, cdiv(hw, block_p), cdiv(hw, block_p) * blocks // (2 * _WAVE)))
    sizes = {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_G": touched_groups(c, c2, values["GROUPS"], block_c)}
    return Tile({**sizes, "STEPS": steps}, num_warps=8 if block_p * block_c >= 4096 else 4, num_stages=1)


def _choose_own(values: Values) -> Tile:
    hw, groups, batch = values["HW"], values["GROUPS"], values["batch"]
    per_group = (values["C"] + values["C2"]) // groups
    # whole 16-byte loads need a multiple of 8 channels per program; more groups only while programs are plenty
    count = next((n for n in (1, 2, 4, 8) if n * per_group % 8 == 0), 1)
    count = min(count, groups)
    while count * 2 * per_group <= 64 and cdiv(groups, count * 2) * batch >= _WAVE:
        count *= 2
    block_c = _next_power_of_2(count * per_group)
    block_p = max(1, min(_next_power_of_2(hw), 16384 // block_c))
    elements = block_p * block_c
    warps = 16 if elements >= 16384 else 8 if elements >= 4096 else 4 if elements >= 1024 else 1
    return Tile({"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_G": count, "STEPS": 1}, num_warps=warps, num_stages=1)


def reference(tensors: Mapping[str, Tensor], values: Values) -> None:
    """The launch in torch, in place: the operators of the reference engine; given statistics are ignored."""
    hw, batch = values["HW"], values["batch"]
    if values["MOMENTS"]:
        write_moments(tensors["x"].float().reshape(batch, values["T"], hw // values["T"], -1), tensors["stats"])
        return
    x = torch.cat(
        [_channels_first(tensors[name], batch, hw) for name in ("x", "x2") if tensors.get(name) is not None], 1
    )
    normalised = torch.nn.functional.group_norm(
        x, values["GROUPS"], tensors["weight"], tensors["bias"], float(values["EPS"])
    )
    result = activation(normalised, values["ACT"]).permute(0, 2, 1)
    if values["OUT"]:
        tensors["out"].copy_(result.reshape(tensors["out"].shape))
    if values["OUT_Q"]:
        write_codes(tensors["out_q"], result, tensors["post"], values)


def write_moments(x: Tensor, stats: Tensor) -> None:
    """Mean and M2 over the pixels of x [B, T, pixels, C] into stats [B, T, 2, C]."""
    mean = x.mean(dim=2)
    stats.copy_(torch.stack((mean, (x - mean[:, :, None]).square().sum(dim=2)), dim=2).reshape(stats.shape))


def _channels_first(x: Tensor, batch: int, hw: int) -> Tensor:
    """[B, ..., C] of any float type to contiguous float32 [B, C, HW]."""
    return x.float().reshape(batch, hw, -1).permute(0, 2, 1).contiguous()


_CONSTANTS: dict[str, Any] = {
    "HW": 0, "C": 0, "C2": 0, "X_STRIDE": 0, "X2_STRIDE": 0, "GROUPS": 1, "EPS": 1e-5, "ACT": 0, "OUT": False,
    "OUT_STRIDE": 0, "OUT_Q": True, "OUT_Q_STRIDE": 0, "QMIN": -128, "QMAX": 127, "T": 0, "T2": 0, "MOMENTS": False,
    "EXACT": False, "ASM": False, "OVERLAP": False,
}  # fmt: skip

KERNEL = Kernel(
    name="groupnorm",
    roles=("x", "x2", "stats", "stats2", "weight", "bias", "post", "out", "out_q"),
    scalars=("batch",),
    constants=_CONSTANTS,
    sizes=("BLOCK_P", "BLOCK_C", "BLOCK_G", "STEPS"),
    grid=grid,
    reference=reference,
    entry="edadm_compile.kernels.triton.groupnorm:groupnorm",
)
