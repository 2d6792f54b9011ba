"""How far each launch reaches: elements from the start of every operand, from the launch's own numbers.

A kernel trusts its constants, scalars and tile sizes. These functions say, for numbers from a file, which elements it can
touch at most, and refuse numbers it was not made for. `tests/kernels/test_footprint.py` compares them with the addresses
that the kernels really use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels.attention import MAX_HEAD
from edadm_compile.kernels.launch import Launch
from edadm_compile.kernels.registry import Kernel, Values, cdiv, kernel
from edadm_compile.kernels.tiles import family, is_asynchronous

#: Offsets that kernels compute in 32 bits stay below this many elements.
INT32 = 1 << 31
_INT8, _INT32, _FLOAT32 = (torch.int8,), (torch.int32,), (torch.float32,)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Reach:
    """What a kernel touches behind one pointer.

    Attributes:
        elements: from the start of the operand, to the last one touched.
        types: element types the kernel is made for.
    """

    elements: int
    types: tuple[torch.dtype, ...]


def reach(launch: Launch) -> dict[str, Reach]:
    """What a launch of one of our kernels touches, by role; exactly the roles that the launch must have.

    Raises:
        ArtifactError: numbers that the kernel is not made for.
    """
    found = kernel(launch.kernel)
    values = found.values(launch)
    _check_types(found, values)
    _check_tile(launch)
    return _REACH[family(launch.kernel)](values, is_asynchronous(launch.tile))


def _need(holds: Any, message: str) -> None:
    if not holds:
        raise ArtifactError(message)


def _check_types(found: Kernel, values: Values) -> None:
    """Every number of the type of its default: what is a flag in a kernel is a flag in the file."""
    for name, default in found.constants.items():
        value = values[name]
        allowed = (int, float) if isinstance(default, float) else (type(default),)
        _need(type(value) in allowed, f"{name} is {value!r}, expected {type(default).__name__}")
        _need(-INT32 < value < INT32, f"{name} is {value!r}")
    for name in (*found.scalars, *found.sizes):
        _need(
            type(values[name]) is int and 1 <= values[name] < INT32, f"{name} is {values[name]!r}, expected 1 or more"
        )


def _check_tile(launch: Launch) -> None:
    warps, stages = launch.tile.num_warps, launch.tile.num_stages
    _need(warps in (1, 2, 4, 8, 16, 32) and 1 <= stages <= 16, f"{warps} warps and {stages} stages")
    for name, size in launch.tile.sizes.items():
        free = name in ("SPLIT_K", "STAGES", "STEPS", "BLOCK_G")  # no extents of tensors in registers
        _need(size <= 1024 if free else size & (size - 1) == 0 and size <= 1 << 16, f"{name} is {size}")


def _at_least(values: Values, least: int, *names: str) -> None:
    for name in names:
        _need(values[name] >= least, f"{name} is {values[name]}, expected {least} or more")


def _outputs(values: Values, rows: int, channels: int) -> dict[str, Reach]:
    """`out` and `out_q` as rows of channels."""
    found = {}
    if values["OUT"]:
        _need(values["OUT_STRIDE"] >= channels, f"OUT_STRIDE is {values['OUT_STRIDE']} for {channels} channels")
        found["out"] = Reach((rows - 1) * values["OUT_STRIDE"] + channels, _FLOATS)
    if values["OUT_Q"]:
        _need(values["OUT_Q_STRIDE"] >= channels, f"OUT_Q_STRIDE is {values['OUT_Q_STRIDE']} for {channels} channels")
        found["out_q"] = Reach((rows - 1) * values["OUT_Q_STRIDE"] + channels, _INT8)
        found["post"] = Reach(3, _FLOAT32)
    return found


def _segment(values: Values, number: str, images: int) -> dict[str, Reach]:
    """x, w, multiplier, bias and pad of one segment of a convolution."""
    v = values
    channels, stride, padded, bits = (v[f"{name}{number}" if name != "X_STRIDE" else f"X{number}_STRIDE"]
                                      for name in ("C", "X_STRIDE", "KC", "BITS"))  # fmt: skip
    _need(
        1 <= channels <= padded and padded % v["BLOCK_K"] == 0,
        f"{padded} for {channels} channels of segment {number!r}",
    )
    _need(stride >= channels and stride % 16 == 0, f"pixels {stride} apart")
    _need(
        bits == 8 or (bits == 4 and v["BLOCK_K"] >= 64 and v["DOTS"] == 2),
        f"{bits}-bit weights in steps of {v['BLOCK_K']}",
    )
    rows = cdiv(v["O"], v["BLOCK_M"]) * v["BLOCK_M"] * (2 if v["GLU"] else 1)
    matrix = rows * v["KH"] * v["KW"] * padded * bits // 8
    _need(v["H"] * v["W"] * stride < INT32 and matrix < INT32, "an image or a weight beyond 32-bit offsets")
    found = {
        f"x{number}": Reach((images * v["H"] * v["W"] - 1) * stride + padded, _INT8),
        f"w{number}": Reach(matrix, (torch.uint8,) if bits == 4 else _INT8),
        f"multiplier{number}": Reach(rows, _FLOAT32),
        f"bias{number}": Reach(rows, _FLOAT32),
    }
    if _leaves_image(v):
        found[f"pad{number}"] = Reach(padded, _INT8)
    return found


def _leaves_image(v: Values) -> bool:
    """Whether a tap can lie outside of the image."""
    below = (v["OH"] - 1) * v["STRIDE_H"] - v["PAD_T"] + (v["KH"] - 1) * v["DIL_H"]
    right = (v["OW"] - 1) * v["STRIDE_W"] - v["PAD_L"] + (v["KW"] - 1) * v["DIL_W"]
    outside = below >= v["H"] * v["UPSAMPLE"] or right >= v["W"] * v["UPSAMPLE"]
    return bool(v["PAD_T"] > 0 or v["PAD_L"] > 0 or outside)


def _matmul(v: Values, count: int, per_image: int, asynchronous: bool) -> dict[str, Reach]:
    """What follows x and w in both matrix kernels: `count` pixels, `per_image` of them in an image."""
    _need(count % per_image == 0, f"{count} pixels in images of {per_image}")
    _need(v["SEGMENTS"] in (1, 2) and v["DOTS"] in (1, 2) and 0 <= v["ACT"] <= 4, "SEGMENTS, DOTS or ACT")
    _need(v["BLOCK_K"] >= 32 and -128 <= v["QMIN"] <= v["QMAX"] <= 127, "BLOCK_K, QMIN or QMAX")
    _at_least(v, 1, "O")
    _at_least(v, 0, "ROW_STRIDE", "RES_STRIDE")
    plain = v["SEGMENTS"] == 1 and not v["GLU"] and v["SPLIT_K"] == 1
    _need(plain or not asynchronous, "two segments, a gate or a split in a kernel without them")
    rows, tiles = cdiv(v["O"], v["BLOCK_M"]) * v["BLOCK_M"], cdiv(count, v["BLOCK_N"])
    pixels = tiles * v["BLOCK_N"]
    _need(pixels < INT32 and rows * max(pixels, per_image) < INT32, "more pixels than 32-bit offsets hold")
    planar = v["OUT"] and v["OUT_NCHW"]
    found = _outputs({**v, "OUT": v["OUT"] and not planar}, count, v["O"])
    if planar:
        found["out"] = Reach(count * v["O"], _FLOATS)
    if v["ROW"]:
        found["row"] = Reach((count // per_image - 1) * v["ROW_STRIDE"] + v["O"], _FLOATS)
    if v["RESIDUAL"]:
        found["residual"] = Reach((count - 1) * v["RES_STRIDE"] + v["O"], _FLOATS)
    if v["STATS"]:
        _need(per_image % v["BLOCK_N"] == 0, "statistics of parts of a tile")
        found["stats"] = Reach(tiles * 2 * v["O"], _FLOAT32)
    if v["SPLIT_K"] > 1:
        planes = v["SPLIT_K"] * v["SEGMENTS"] * (2 if v["GLU"] else 1)
        found["partial"] = Reach(planes * rows * pixels, _INT32)
        found["counter"] = Reach(rows // v["BLOCK_M"] * tiles, _INT32)
    return found


def _qconv2d(v: Values, asynchronous: bool) -> dict[str, Reach]:
    _at_least(v, 1, "H", "W", "OH", "OW", "KH", "KW", "STRIDE_H", "STRIDE_W", "DIL_H", "DIL_W")
    _at_least(v, 0, "PAD_T", "PAD_L")
    _need(v["UPSAMPLE"] in (1, 2), f"UPSAMPLE is {v['UPSAMPLE']}")
    positions = [
        (v[f"O{a}"] * v[f"STRIDE_{a}"] + v[f"K{a}"] * v[f"DIL_{a}"]) * v[b] for a, b in (("H", "W"), ("W", "H"))
    ]
    strides = max(v["X_STRIDE"], v["X2_STRIDE"])
    _need(max(positions) * max(strides, 1) < INT32, "taps beyond 32-bit offsets")
    found = _matmul(v, v["pixels"], v["OH"] * v["OW"], asynchronous)
    images = v["pixels"] // (v["OH"] * v["OW"])
    for number in ("", "2")[: v["SEGMENTS"]]:
        found |= _segment(v, number, images)
    return found


def _qlinear(v: Values, asynchronous: bool) -> dict[str, Reach]:
    _at_least(v, 1, "ROWS_PER_IMAGE")
    found = _matmul(v, v["rows"], v["ROWS_PER_IMAGE"], asynchronous)
    ones = dict.fromkeys(("H", "W", "OH", "OW", "KH", "KW", "STRIDE_H", "STRIDE_W", "DIL_H", "DIL_W", "UPSAMPLE"), 1)
    for number in ("", "2")[: v["SEGMENTS"]]:
        found |= _segment({**v, **ones, "PAD_T": 0, "PAD_L": 0}, number, v["rows"])
    return found


def _quantize(v: Values, _: bool) -> dict[str, Reach]:
    _at_least(v, 1, "HW", "C")
    _at_least(v, 0, "X_BATCH", "X_PIXEL", "X_CHANNEL")
    _need(v["TERMS"] in (1, 2) and 0 <= v["ACT"] <= 4, "TERMS or ACT")
    _need(-(1 << 15) <= v["QMIN"] <= v["QMAX"] < 1 << 15, "QMIN or QMAX")
    size = (v["HW"] + v["BLOCK_P"]) * max(v["X_PIXEL"], v["OUT_STRIDE"], v["OUT_Q_STRIDE"])
    _need(size + (v["C"] + v["BLOCK_C"]) * v["X_CHANNEL"] < INT32, "an image beyond 32-bit offsets")
    images = v["batch"]
    last = (images - 1) * v["X_BATCH"] + (v["HW"] - 1) * v["X_PIXEL"] + (v["C"] - 1) * v["X_CHANNEL"]
    found = {"x": Reach(last + 1, _FLOATS), **_outputs(v, images * v["HW"], v["C"])}
    if v["OUT_Q"]:
        found["out_q"] = Reach(images * v["HW"] * v["OUT_Q_STRIDE"], _INT8)
        if v["TERMS"] == 2:
            found["out_q_lo"] = found["out_q"]
    return found


def _groupnorm(v: Values, _: bool) -> dict[str, Reach]:
    _at_least(v, 1, "HW", "C", "GROUPS", "X_STRIDE")
    _at_least(v, 0, "C2", "T", "T2", "X2_STRIDE")
    channels, rows = v["C"] + v["C2"], v["batch"] * v["HW"]
    _need(channels % v["GROUPS"] == 0 and 0 <= v["ACT"] <= 4, f"{channels} channels in {v['GROUPS']} groups, or ACT")
    stride = max(v["X_STRIDE"], v["X2_STRIDE"], v["OUT_STRIDE"], v["OUT_Q_STRIDE"])
    span = v["HW"] + v["BLOCK_P"] * (v["STEPS"] + 1)
    _need(span * stride < INT32 and max(v["T"], v["T2"]) * 2 * channels < INT32, "an image beyond 32-bit offsets")
    found = {"x": Reach((rows - 1) * v["X_STRIDE"] + v["C"], _FLOATS)}
    if v["T"]:
        _need(v["HW"] % v["T"] == 0, f"{v['T']} parts of {v['HW']} pixels")
        found["stats"] = Reach(v["batch"] * v["T"] * 2 * v["C"], _FLOAT32)
    if v["MOMENTS"]:
        _at_least(v, 1, "T")
        return found
    if v["C2"]:
        found["x2"] = Reach((rows - 1) * v["X2_STRIDE"] + v["C2"], _FLOATS)
    if v["T"] and v["C2"]:
        _need(v["T2"] >= 1 and v["HW"] % v["T2"] == 0, f"{v['T2']} parts of {v['HW']} pixels")
        found["stats2"] = Reach(v["batch"] * v["T2"] * 2 * v["C2"], _FLOAT32)
    if not v["T"]:
        _need(v["BLOCK_C"] >= v["BLOCK_G"] * (channels // v["GROUPS"]), "groups that do not fit into a block")
    affine = Reach(channels, _FLOAT32)
    return {**found, "weight": affine, "bias": affine, **_outputs(v, rows, channels)}


def _layernorm(v: Values, _: bool) -> dict[str, Reach]:
    _at_least(v, 1, "C")
    _at_least(v, 0, "X_STRIDE")
    _need(v["BLOCK_C"] >= v["C"], f"rows of {v['C']} in blocks of {v['BLOCK_C']}")
    found = {"x": Reach((v["rows"] - 1) * v["X_STRIDE"] + v["C"], _FLOATS), **_outputs(v, v["rows"], v["C"])}
    for role in ("weight", "bias"):
        if v[f"HAS_{role.upper()}"]:
            found[role] = Reach(v["C"], _FLOAT32)
    return found


def _heads(v: Values, types: tuple[torch.dtype, ...]) -> dict[str, Reach]:
    """q, k, v and the outputs of both attention kernels."""
    _at_least(v, 1, "LQ", "LK", "HEADS", "D")
    _need(v["D"] <= MAX_HEAD, f"heads of {v['D']}, allowed {MAX_HEAD}")
    found = {}
    for role, length in (("q", v["LQ"]), ("k", v["LK"]), ("v", v["LK"])):
        batch, row, head = (v[f"{role.upper()}_{name}"] for name in ("BATCH", "ROW", "HEAD"))
        _need(min(batch, row, head) >= 0, f"negative strides of {role}")
        _need((length + v["BLOCK_Q"] + v["BLOCK_KV"]) * row + v["HEADS"] * head < INT32, "heads beyond 32-bit offsets")
        last = (v["batch"] - 1) * batch + (v["HEADS"] - 1) * head + (length - 1) * row
        found[role] = Reach(last + v["D"], types)
    widest = max(v["OUT_STRIDE"], v["OUT_Q_STRIDE"])
    _need((v["LQ"] + v["BLOCK_Q"]) * widest < INT32, "an image beyond 32-bit offsets")
    return {**found, **_outputs(v, v["batch"] * v["LQ"], v["HEADS"] * v["D"])}


def _attention(v: Values, _: bool) -> dict[str, Reach]:
    return {**_heads(v, _INT8), "params": Reach(7, _FLOAT32)}


def _attention_float(v: Values, _: bool) -> dict[str, Reach]:
    return _heads(v, _FLOATS)


_REACH: Mapping[str, Callable[[Values, bool], dict[str, Reach]]] = {
    "qconv2d": _qconv2d, "qlinear": _qlinear, "quantize": _quantize, "groupnorm": _groupnorm, "layernorm": _layernorm,
    "attention": _attention, "attention_float": _attention_float,
}  # fmt: skip
