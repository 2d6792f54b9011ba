"""Operators that move values to new places or repeat them: shuffles, paddings, rolls, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.operands import (
    FAR,
    as_dim,
    at_least_1d,
    axis_of,
    cut,
    fixed,
    times,
    transpose,
)
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument

_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pixel_shuffle(s: Scope, node: fx.Node) -> Emitted:
    """``[..., C r r, H, W]`` to ``[..., C, H r, W r]``."""
    source: Any = node.args[0]
    r = int(argument(node, 1, "upscale_factor"))
    *lead, _, height, width = have = s.dims(source)
    out, n = s.dims(node), len(lead)
    split = s.reshape(s.value(source), [*lead, out[-3], Dim(r), Dim(r), height, width], have)
    moved = transpose(s, split, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return s.reshape(moved, out, lead, name=node.name)


def _pixel_unshuffle(s: Scope, node: fx.Node) -> Emitted:
    """``[..., C, H r, W r]`` to ``[..., C r r, H, W]``."""
    source: Any = node.args[0]
    r = int(argument(node, 1, "downscale_factor"))
    *lead, channels, _, _ = have = s.dims(source)
    out, n = s.dims(node), len(lead)
    split = s.reshape(s.value(source), [*lead, channels, out[-2], Dim(r), out[-1], Dim(r)], have)
    moved = transpose(s, split, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return s.reshape(moved, out, lead, name=node.name)


def _repeat(s: Scope, node: fx.Node) -> Emitted:
    """Whole copies one behind the other; new dimensions in front."""
    source: Any = node.args[0]
    repeats = [as_dim(r) for r in s.plain(argument(node, 1, "repeats"))]
    have = s.dims(source)
    missing = len(repeats) - len(have)
    x = s.value(source)
    if missing:
        x = s.op("Unsqueeze", x, s.const(list(range(missing))))
    return s.op("Tile", x, s.sizes(repeats), name=node.name)


def _repeat_interleave(s: Scope, node: fx.Node) -> Emitted:
    """Every element several times: Expand of a new dimension behind the one that grows."""
    source: Any = node.args[0]
    repeats, dim = as_dim(s.plain(argument(node, 1, "repeats"))), argument(node, 2, "dim")
    have = list(s.dims(source))
    x = at_least_1d(s, source)
    if dim is None:
        have = [times(have)]
        x = s.reshape(x, have)
    axis = (dim or 0) % len(have)
    grown = [Dim(1)] * (len(have) + 1)
    grown[axis + 1] = repeats
    wider = s.op("Expand", s.op("Unsqueeze", x, s.const([axis + 1])), s.sizes(grown))
    return s.reshape(wider, s.dims(node), have[:axis], name=node.name)


def padded(
    s: Scope, x: ir.Value, rank: int, widths: Sequence[Any], mode: str = "constant", value: ir.Value | None = None,
    name: str = "",
) -> ir.Value:  # fmt: skip
    """Pad by widths in torch's order: last dimension first, both sides of each."""
    if mode not in _PAD_MODES:
        raise ExportError(f"pad: mode {mode!r} has no ONNX form")
    sides = [as_dim(w) for w in widths] + [Dim(0)] * (2 * rank - len(widths))
    if mode != "constant" and any(d.fixed < 0 for d in sides):
        raise ExportError(f"pad: negative widths in mode {mode!r} have no ONNX form")
    pads = s.sizes([*reversed(sides[0::2]), *reversed(sides[1::2])])
    fill = () if value is None else (value,)
    return s.op("Pad", x, pads, *fill, mode=_PAD_MODES[mode], name=name)


def _pad(s: Scope, node: fx.Node) -> Emitted:
    mode, fill = argument(node, 2, "mode", "constant"), argument(node, 3, "value", 0)
    return _padded_input(s, node, mode, fill)


def _constant_pad(s: Scope, node: fx.Node) -> Emitted:
    return _padded_input(s, node, "constant", argument(node, 2, "value", 0))


def _padded_input(s: Scope, node: fx.Node, mode: str, fill: Any) -> ir.Value:
    source: Any = node.args[0]
    value = s.value(fill, s.dtype(node)) if mode == "constant" and fill else None
    return padded(s, s.value(source), s.rank(source), s.plain(argument(node, 1, "pad")), mode, value, name=node.name)


def _roll(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    shifts, dims = s.plain(argument(node, 1, "shifts")), argument(node, 2, "dims", [])
    have, x = s.dims(source), s.value(source)
    shifts = [shifts] if isinstance(shifts, int) else shifts
    dims = [dims] if isinstance(dims, int) else list(dims)
    sizes = have if dims else [times(have)]
    x = x if dims else s.reshape(x, sizes)
    for shift, dim in zip(shifts, dims or [0], strict=True):
        size = fixed(sizes[dim], "roll: the size of a rolled dimension")
        if size and shift % size:
            start, axis = size - shift % size, dim % len(sizes)
            x = s.op("Concat", cut(s, x, axis, start, FAR), cut(s, x, axis, 0, start), axis=axis)
    return x if dims else s.reshape(x, have, name=node.name)


def _flip(s: Scope, node: fx.Node) -> Emitted:
    axes = [axis_of(s, node.args[0], d) for d in argument(node, 1, "dims")]
    if not axes:
        return s.value(node.args[0])
    start, end, step = ([v] * len(axes) for v in (-1, -FAR, -1))
    return s.op("Slice", s.value(node.args[0]), *(s.const(v) for v in (start, end, axes, step)), name=node.name)


def windows(size: int, length: int, step: int, dilation: int = 1) -> torch.Tensor:
    """Positions [count, length] of windows over `size` elements."""
    count = (size - dilation * (length - 1) - 1) // step + 1
    return torch.arange(count)[:, None] * step + torch.arange(length) * dilation


def _unfold(s: Scope, node: fx.Node) -> Emitted:
    """Windows along a dimension, their elements as the last dimension."""
    source: Any = node.args[0]
    dim, length, step = (int(argument(node, i, n)) for i, n in ((1, "dimension"), (2, "size"), (3, "step")))
    rank, axis = max(s.rank(source), 1), axis_of(s, source, dim)
    size = fixed(s.dims(source)[axis], "unfold: the size of the dimension") if s.rank(source) else 1
    table = s.const(windows(size, length, step))
    gathered = s.op("Gather", at_least_1d(s, source), table, axis=axis, name=node.name)
    moved = transpose(s, gathered, [d for d in range(rank + 1) if d != axis + 1] + [axis + 1])
    return moved if s.rank(source) else s.reshape(moved, s.dims(node))


TABLE: dict[str, Emitter] = {
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.pixel_unshuffle.default": _pixel_unshuffle,
    "aten.repeat.default": _repeat,
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.constant_pad_nd.default": _constant_pad,
    "aten.pad.default": _pad,
    "aten.roll.default": _roll,
    "aten.flip.default": _flip,
    "aten.unfold.default": _unfold,
}
