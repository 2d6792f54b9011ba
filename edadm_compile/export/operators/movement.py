"""Operators that only move values: shapes, orders, cuts. They hold for codes as for floats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.operands import (
    FAR,
    as_dim,
    axis_of,
    cut,
    fixed,
    scalar,
    transpose,
)
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _reshape(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    have, want = s.dims(source), s.dims(node)
    return s.value(source) if have == want else s.reshape(s.value(source), want, have, name=node.name)


def identity(s: Scope, node: fx.Node) -> Emitted:
    """The same value."""
    return s.value(node.args[0])


def _dropout(s: Scope, node: fx.Node) -> Emitted:
    if argument(node, 2, "train", False) and argument(node, 1, "p") != 0:
        raise ExportError("dropout: train=True is random and has no ONNX form; capture the model in eval mode")
    return identity(s, node)


def expanded(s: Scope, value: ir.Value, have: Sequence[Dim], want: Sequence[Dim], name: str = "") -> ir.Value:
    """Expand; sizes that stay are given as 1, so that most need nothing from the batch."""
    missing = len(want) - len(have)
    sizes = [Dim(1) if i >= missing and have[i - missing] == d else d for i, d in enumerate(want)]
    if all(d == Dim(1) for d in sizes) and not missing:
        return value
    return s.op("Expand", value, s.sizes(sizes), name=name)


def expand(s: Scope, node: fx.Node) -> Emitted:
    """To the shape of the node."""
    source: Any = node.args[0]
    return expanded(s, s.value(source), s.dims(source), s.dims(node), name=node.name)


def _permute(s: Scope, node: fx.Node) -> Emitted:
    order = [axis_of(s, node.args[0], d) for d in argument(node, 1, "dims")]
    return transpose(s, s.value(node.args[0]), order, name=node.name)


def _swap(first: int | None = None, second: int | None = None) -> Emitter:
    """Two dimensions exchanged: the given ones, or the arguments."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        rank = s.rank(node)
        if rank < 2:
            return s.value(node.args[0])
        given: Any = node.args[1:3] if first is None else (first, second)
        a, b = (d % rank for d in given)
        order = list(range(rank))
        order[a], order[b] = b, a
        return transpose(s, s.value(node.args[0]), order, name=node.name)

    return emit


def _movedim(s: Scope, node: fx.Node) -> Emitted:
    rank = s.rank(node)
    given: list[Any] = [argument(node, 1, "source"), argument(node, 2, "destination")]
    source, destination = ([d % rank for d in ([v] if isinstance(v, int) else v)] for v in given)
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[destination.index(i)] if i in destination else next(rest) for i in range(rank)]
    return transpose(s, s.value(node.args[0]), order, name=node.name)


def _slice(s: Scope, node: fx.Node) -> Emitted:
    start, end, step = (
        s.plain(argument(node, i, n, d)) for i, n, d in ((2, "start", 0), (3, "end", FAR), (4, "step", 1))
    )
    axis = axis_of(s, node.args[0], argument(node, 1, "dim", 0))
    start, end = start if start is not None else 0, end if end is not None else FAR
    return cut(s, s.value(node.args[0]), axis, start, end, fixed(step, "slice: the step"), name=node.name)


def _select(s: Scope, node: fx.Node) -> Emitted:
    index = scalar(s, s.plain(argument(node, 2, "index")))
    axis = axis_of(s, node.args[0], argument(node, 1, "dim"))
    return s.op("Gather", s.value(node.args[0]), index, axis=axis, name=node.name)


def pieces(s: Scope, node: fx.Node, axis: int, sizes: Sequence[Dim]) -> tuple[ir.Value, ...]:
    """The input cut along an axis."""
    x = s.value(node.args[0])
    if len(sizes) == 1:
        return (x,)
    return s.builder.ops("Split", x, s.sizes(sizes), outputs=len(sizes), axis=axis, name=node.name)


def _chunk(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    count = int(argument(node, 1, "chunks"))
    axis = axis_of(s, source, argument(node, 2, "dim", 0))
    total = s.dims(source)[axis]
    if not total.is_fixed and total.fixed % count == total.per_image % count == 0:
        return pieces(s, node, axis, [Dim(total.fixed // count, total.per_image // count)] * count)
    size = -(-fixed(total, "chunk: the divided size") // count)
    return pieces(s, node, axis, _equal(total.fixed, size))


def _equal(total: int, size: int) -> list[Dim]:
    """Sizes of pieces of `size`, the last one smaller if need be."""
    return [Dim(min(size, total - start)) for start in range(0, total, size)] or [Dim(0)]


def _split(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    axis = axis_of(s, source, argument(node, 2, "dim", 0))
    total, size = s.dims(source)[axis], as_dim(s.plain(argument(node, 1, "split_size")))
    if not size.is_fixed and total.per_image % size.per_image == 0:
        count = total.per_image // size.per_image
        if total.fixed == count * size.fixed:
            return pieces(s, node, axis, [size] * count)
    where = "split: the divided size"
    return pieces(s, node, axis, _equal(fixed(total, where), fixed(size, where)))


def _split_with_sizes(s: Scope, node: fx.Node) -> Emitted:
    sizes = [as_dim(size) for size in s.plain(argument(node, 1, "split_sizes"))]
    return pieces(s, node, axis_of(s, node.args[0], argument(node, 2, "dim", 0)), sizes)


def _unbind(s: Scope, node: fx.Node) -> Emitted:
    source: Any = node.args[0]
    axis = axis_of(s, source, argument(node, 1, "dim", 0))
    count = fixed(s.dims(source)[axis], "unbind: the number of tensors")
    axes = s.const([axis])
    return tuple(s.op("Squeeze", piece, axes) for piece in pieces(s, node, axis, [Dim(1)] * count))


_RESHAPES = (
    "view.default", "reshape.default", "_unsafe_view.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "flatten.using_ints", "unflatten.int", "view_as.default",
)  # fmt: skip
_IDENTITIES = ("contiguous.default", "clone.default", "alias.default", "lift_fresh_copy.default", "detach.default")

TABLE: dict[str, Emitter] = {
    **{f"aten.{name}": _reshape for name in _RESHAPES},
    **{f"aten.{name}": identity for name in _IDENTITIES},
    **{f"aten.{name}": expand for name in ("expand.default", "expand_as.default", "broadcast_to.default")},
    "aten.dropout.default": _dropout,
    "aten.permute.default": _permute,
    "aten.transpose.int": _swap(),
    "aten.swapaxes.default": _swap(),
    "aten.t.default": _swap(0, 1),
    "aten.movedim.int": _movedim,
    "aten.movedim.intlist": _movedim,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.chunk.default": _chunk,
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split_with_sizes,
    "aten.unbind.int": _unbind,
}
