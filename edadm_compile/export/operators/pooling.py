"""Pooling, and windows of images as columns and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.movement import expanded
from edadm_compile.export.operators.operands import fixed, spread, times, transpose, used
from edadm_compile.export.operators.rearrangement import padded, windows
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def images(s: Scope, node: fx.Node, spatial: int = 2) -> tuple[ir.Value, list[Dim], list[int]]:
    """The input as [B, C, ...], its sizes, and the spatial ones as numbers; without a batch B is 1."""
    source: Any = node.args[0]
    have, x = list(s.dims(source)), s.value(source)
    if len(have) == spatial + 1:
        have = [Dim(1), *have]
        x = s.reshape(x, have)
    return x, have, [fixed(d, "a size of the image") for d in have[2:]]


def shaped(s: Scope, node: fx.Node, value: ir.Value, have: Sequence[Dim]) -> ir.Value:
    """A result [B, C, ...] in the shape of the node: without the batch that `images` added."""
    source: Any = node.args[0]
    return value if s.rank(source) == len(have) else s.op("Squeeze", value, s.const([0]))


def _settings(node: fx.Node, spatial: int, first: int) -> tuple[list[int], list[int], list[int]]:
    """(kernel, stride, padding); the stride defaults to the kernel."""
    kernel = spread(argument(node, first, "kernel_size"), spatial)
    stride, padding = argument(node, first + 1, "stride", []), argument(node, first + 2, "padding", 0)
    return kernel, spread(stride, spatial) if stride else kernel, spread(padding, spatial)


def _end_pads(
    sizes: list[int], kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> list[int]:
    """Padding behind the image that gives torch's number of windows.

    Rounded up, the last window may stick out, but has to start inside the image or the padding in front of it.
    """
    ends = []
    for n, k, step, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True):
        span, reach = n + 2 * p, d * (k - 1) + 1
        count = (span - reach + (step - 1 if ceil else 0)) // step + 1
        if ceil and (count - 1) * step >= n + p:
            count -= 1
        ends.append(max(p, (count - 1) * step + reach - n - p))
    return ends


def _avg_pool(spatial: int) -> Emitter:
    """AveragePool. Where windows stick out, padding that counts joins the image first; what is beyond never counts."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        x, have, sizes = images(s, node, spatial)
        kernel, stride, padding = _settings(node, spatial, 1)
        ceil, divisor = bool(argument(node, 4, "ceil_mode", False)), argument(node, 6, "divisor_override")
        counted = divisor is not None or bool(argument(node, 5, "count_include_pad", True))
        ends = _end_pads(sizes, kernel, stride, padding, [1] * spatial, ceil)
        starts = padding
        if counted and ends != padding:
            inner = padding if divisor is None else ends
            x = padded(s, x, len(have), [w for sides in zip(padding[::-1], inner[::-1], strict=True) for w in sides])
            starts, ends = [0] * spatial, [e - i for e, i in zip(ends, inner, strict=True)]
            counted = divisor is not None
        result = s.op(
            "AveragePool", x, kernel_shape=kernel, strides=stride, pads=[*starts, *ends],
            count_include_pad=int(counted), name=node.name,
        )  # fmt: skip
        if divisor is not None:
            result = s.op("Mul", result, s.value(math.prod(kernel) / divisor, s.dtype(node)))
        return shaped(s, node, result, have)

    return emit


def _max_pool(s: Scope, node: fx.Node, indices: bool) -> tuple[ir.Value, ...]:
    """MaxPool; a Gather of every window where padding reaches the size of the kernel: ONNX Runtime refuses that."""
    x, have, sizes = images(s, node)
    kernel, stride, padding = _settings(node, 2, 1)
    dilation = spread(argument(node, 4, "dilation", 1), 2)
    ends = _end_pads(sizes, kernel, stride, padding, dilation, bool(argument(node, 5, "ceil_mode", False)))
    lines = [_inside(*how) for how in zip(sizes, kernel, stride, padding, ends, dilation, strict=True)]
    if not all(all(line) for line in lines):
        raise ExportError("max_pool2d: a window that lies in the padding alone has no ONNX form")
    if any(e >= k for e, k in zip(ends, kernel, strict=True)):
        return _largest(s, node, x, have, lines, indices)
    results = s.builder.ops(
        "MaxPool", x, outputs=2 if indices else 1, kernel_shape=kernel, strides=stride, pads=[*padding, *ends],
        dilations=dilation, name=node.name,
    )  # fmt: skip
    if indices:  # ONNX counts through the whole tensor, torch within each image
        results = (results[0], s.op("Mod", results[1], s.const(math.prod(sizes))))
    return tuple(shaped(s, node, value, have) for value in results)


def _inside(size: int, kernel: int, stride: int, start: int, end: int, dilation: int) -> list[list[int]]:
    """For every window along one dimension the positions that are not padding."""
    table = windows(start + size + end, kernel, stride, dilation) - start
    return [[p for p in row if 0 <= p < size] for row in table.tolist()]


def _adaptive(size: int, count: int) -> list[list[int]]:
    """Positions of adaptive windows along one dimension, as torch places them."""
    return [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]


def _averages(size: int, count: int) -> torch.Tensor:
    """[count, size] weights of adaptive windows."""
    weights = torch.zeros(count, size, dtype=torch.float64)
    for row, window in zip(weights, _adaptive(size, count), strict=True):
        row[window] = 1 / len(window)
    return weights


def _adaptive_avg_pool(s: Scope, node: fx.Node) -> Emitted:
    """AveragePool where the sizes divide, else a product with the weights of every window from both sides."""
    x, have, sizes = images(s, node)
    counts = [
        c if c is not None else n for c, n in zip(spread(argument(node, 1, "output_size"), 2), sizes, strict=True)
    ]
    if all(n % c == 0 for n, c in zip(sizes, counts, strict=True)):
        window = [n // c for n, c in zip(sizes, counts, strict=True)]
        return shaped(s, node, s.op("AveragePool", x, kernel_shape=window, strides=window, name=node.name), have)
    rows, columns = (_averages(n, c) for n, c in zip(sizes, counts, strict=True))
    dtype = s.dtype(node)
    across = s.op("MatMul", x, s.const(columns.T, dtype))
    return shaped(s, node, s.op("MatMul", s.const(rows, dtype), across, name=node.name), have)


def _adaptive_max_pool(s: Scope, node: fx.Node) -> Emitted:
    x, have, sizes = images(s, node)
    counts = spread(argument(node, 1, "output_size"), 2)
    lines = [_adaptive(n, c) for n, c in zip(sizes, counts, strict=True)]
    return _largest(s, node, x, have, lines, used(node, 1))


def _largest(
    s: Scope, node: fx.Node, x: ir.Value, have: list[Dim], lines: list[list[list[int]]], indices: bool
) -> tuple[ir.Value, ...]:
    """Gather of every window, then maximum and its first place.

    Args:
        lines: positions of the windows, for each dimension.
    """
    width = have[3].fixed
    flat = [torch.tensor([r * width + c for r in rows for c in columns]) for rows in lines[0] for columns in lines[1]]
    longest = max(len(w) for w in flat)
    table = torch.stack([torch.cat([w, w[:1].expand(longest - len(w))]) for w in flat])  # first ones fill short windows
    gathered = s.op("Gather", s.reshape(x, [*have[:2], times(have[2:])], have), s.const(table), axis=2)
    want = [*have[:2], *(Dim(len(line)) for line in lines)]
    best = s.reshape(s.op("ReduceMax", gathered, s.const([3]), keepdims=0), want, have, name=node.name)
    if not indices:
        return (shaped(s, node, best, have),)
    place = s.op("ArgMax", gathered, axis=3, keepdims=1)
    sizes = [Dim(n) for n in table.shape]
    every = expanded(s, s.const(table), sizes, [*have[:2], *sizes])
    places = s.reshape(s.op("GatherElements", every, place, axis=3), want, have)
    return shaped(s, node, best, have), shaped(s, node, places, have)


def _im2col(s: Scope, node: fx.Node) -> Emitted:
    """Two Gathers of window positions: [B, C, kh, H', kw, W'], then [B, C kh kw, H' W']."""
    x, have, sizes = images(s, node)
    kernel, dilation, padding, stride = (spread(argument(node, i, n), 2) for i, n in enumerate(
        ("kernel_size", "dilation", "padding", "stride"), 1))  # fmt: skip
    if any(padding):
        x = padded(s, x, 4, [p for p in reversed(padding) for _ in range(2)])
    tables = [
        windows(n + 2 * p, k, step, d).T.contiguous()
        for n, p, k, step, d in zip(sizes, padding, kernel, stride, dilation, strict=True)
    ]
    x = s.op("Gather", x, s.const(tables[0]), axis=2)
    x = transpose(s, s.op("Gather", x, s.const(tables[1]), axis=4), [0, 1, 2, 4, 3, 5])
    elements = times([have[1], *(Dim(k) for k in kernel)])
    places = Dim(math.prod(t.shape[1] for t in tables))
    return shaped(s, node, s.reshape(x, [have[0], elements, places], have, name=node.name), have)


def _col2im(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    size, kernel, dilation, padding, stride = (spread(argument(node, i, n), 2) for i, n in enumerate(
        ("output_size", "kernel_size", "dilation", "padding", "stride"), 1))  # fmt: skip
    x = s.value(source)
    single = s.rank(source) == 2
    if single:
        x = s.op("Unsqueeze", x, s.const([0]))
    image = s.op(
        "Col2Im", x, s.const(size), s.const(kernel), dilations=dilation, pads=padding * 2, strides=stride,
        name=node.name,
    )  # fmt: skip
    return s.op("Squeeze", image, s.const([0])) if single else image


def _border_pad(mode: str) -> Emitter:
    def emit(s: Scope, node: fx.Node) -> Emitted:
        source: Any = node.args[0]
        return padded(s, s.value(source), s.rank(source), s.plain(argument(node, 1, "padding")), mode, name=node.name)

    return emit


TABLE: dict[str, Emitter] = {
    "aten.avg_pool1d.default": _avg_pool(1),
    "aten.avg_pool2d.default": _avg_pool(2),
    "aten.max_pool2d.default": lambda s, node: _max_pool(s, node, indices=False)[0],
    "aten.max_pool2d_with_indices.default": lambda s, node: _max_pool(s, node, indices=used(node, 1)),
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool,
    "aten._adaptive_avg_pool2d.default": _adaptive_avg_pool,
    "aten.adaptive_max_pool2d.default": _adaptive_max_pool,
    "aten.im2col.default": _im2col,
    "aten.col2im.default": _col2im,
    "aten.reflection_pad2d.default": _border_pad("reflect"),
    "aten.replication_pad2d.default": _border_pad("replicate"),
}
