"""Elements chosen by indices: reading and writing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.movement import expanded
from edadm_compile.export.operators.operands import (
    as_node,
    at_least_1d,
    axis_of,
    broadcast,
    cast,
    fixed,
    select,
    transpose,
    wide,
)
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument

_MASKS = (torch.bool, torch.uint8)


def _index_value(s: Scope, index: Any) -> ir.Value:
    """Indices as int64."""
    return s.value(index, torch.int64)


def _embedding(s: Scope, node: fx.Node) -> Emitted:
    return s.op("Gather", s.value(node.args[0]), _index_value(s, node.args[1]), axis=0, name=node.name)


def _index_select(s: Scope, node: fx.Node) -> Emitted:
    source, index = node.args[0], node.args[2]
    axis = axis_of(s, source, argument(node, 1, "dim"))
    result = s.op("Gather", at_least_1d(s, source), at_least_1d(s, index, torch.int64), axis=axis, name=node.name)
    return as_node(s, result, node)


def _gather(s: Scope, node: fx.Node) -> Emitted:
    source, index = node.args[0], node.args[2]
    axis = axis_of(s, source, argument(node, 1, "dim"))
    x, positions = at_least_1d(s, source), at_least_1d(s, index, torch.int64)
    return as_node(s, s.op("GatherElements", x, positions, axis=axis, name=node.name), node)


class _Indices:
    """The index tensors of ``x[:, i, j]``, as GatherND and ScatterND want them.

    Attributes:
        order: dimensions of x, the indexed ones first.
        back: where the indexed result has its broadcast index dimensions: `lead` in front or at `position`.
        table: int64 [broadcast index sizes, number of indexed dimensions].
    """

    def __init__(self, s: Scope, source: Any, given: list[Any]) -> None:
        chosen = [(dim, index) for dim, index in enumerate(given) if index is not None]
        if any(s.dtype(index) in _MASKS for _, index in chosen):
            raise ExportError(
                "index: a mask selects a number of elements that depends on values, which has no ONNX form here"
            )
        self.dims = [dim for dim, _ in chosen]
        rank, have = s.rank(source), s.dims(source)
        rest = [dim for dim in range(rank) if dim not in self.dims]
        self.order = self.dims + rest
        self.sizes = broadcast(*(s.dims(index) for _, index in chosen))
        self.count = len(self.sizes)
        adjacent = self.dims == list(range(self.dims[0], self.dims[-1] + 1))
        self.position = self.dims[0] if adjacent else 0
        left = [have[dim] for dim in rest]
        self.result = left[: self.position] + self.sizes + left[self.position :]
        columns = [expanded(s, _index_value(s, index), s.dims(index), self.sizes) for _, index in chosen]
        last = s.const([-1])
        columns = [s.op("Unsqueeze", column, last) for column in columns]
        self.table = columns[0] if len(columns) == 1 else s.op("Concat", *columns, axis=-1)

    def to_result(self) -> list[int]:
        """Order that brings [index dimensions, rest] into the form of the result."""
        rest = range(self.count, len(self.result))
        return [*rest[: self.position], *range(self.count), *rest[self.position :]]


def _index(s: Scope, node: fx.Node) -> Emitted:
    source, given = node.args[0], list(argument(node, 1, "indices"))
    chosen = [(dim, index) for dim, index in enumerate(given) if index is not None]
    if len(chosen) == 1 and s.dtype(chosen[0][1]) not in _MASKS:
        dim, index = chosen[0]
        return s.op("Gather", s.value(source), _index_value(s, index), axis=dim, name=node.name)
    indices = _Indices(s, source, given)
    gathered = s.op("GatherND", transpose(s, s.value(source), indices.order), indices.table)
    return transpose(s, gathered, indices.to_result(), name=node.name)


def _index_put(s: Scope, node: fx.Node) -> Emitted:
    """ScatterND; with a mask and a single value, Where."""
    source, given, values = node.args[0], list(argument(node, 1, "indices")), node.args[2]
    dtype, accumulate = s.dtype(node), bool(argument(node, 3, "accumulate", False))
    have = s.dims(source)  # type: ignore[arg-type]
    x, new = s.value(source), s.value(values, dtype)
    if len(given) == 1 and s.dtype(given[0]) in _MASKS and not accumulate:
        return _put_by_mask(s, node, x, given[0], new)
    indices = _Indices(s, source, given)
    new = expanded(s, new, s.dims(values), indices.result)  # type: ignore[arg-type]
    new = transpose(s, new, _inverse(indices.to_result()))
    reduction = "add" if accumulate else "none"
    work = wide(dtype) if accumulate else dtype
    data = cast(s, transpose(s, x, indices.order), dtype, work)
    put = s.op("ScatterND", data, indices.table, cast(s, new, dtype, work), reduction=reduction)
    assert len(have) == len(indices.order)
    return transpose(s, cast(s, put, work, dtype), _inverse(indices.order), name=node.name)


def _put_by_mask(s: Scope, node: fx.Node, x: ir.Value, mask: Any, new: ir.Value) -> ir.Value:
    """Where; the values are the same for all elements that the mask selects."""
    rest = s.rank(node) - s.rank(mask)
    have: Any = node.args[2]
    if any(d != Dim(1) for d in s.dims(have)[: max(0, s.rank(have) - rest)]):
        raise ExportError("index_put: several values for the elements of a mask have no ONNX form here")
    condition = s.value(mask, torch.bool)
    if rest:
        condition = s.op("Unsqueeze", condition, s.const([-1 - i for i in range(rest)]))
    dtype = s.dtype(node)
    return select(s, condition, new, x, dtype, name=node.name)


def _inverse(order: list[int]) -> list[int]:
    return [order.index(i) for i in range(len(order))]


def _scatter(s: Scope, node: fx.Node) -> Emitted:
    """ScatterElements; of `src` only the part in the shape of the index counts."""
    source, index, src = (node.args[i] for i in (0, 2, 3))
    dtype, axis = s.dtype(node), axis_of(s, source, argument(node, 1, "dim"))
    positions = at_least_1d(s, index, torch.int64)
    want = list(s.dims(index)) or [Dim(1)]  # type: ignore[arg-type]
    if not s.is_tensor(src):
        updates = expanded(s, s.value(src, dtype), (), want)
    else:
        updates = at_least_1d(s, src, dtype)
        have = list(s.dims(src)) or [Dim(1)]  # type: ignore[arg-type]
        axes = [i for i, (h, w) in enumerate(zip(have, want, strict=True)) if h != w]
        if axes:
            ends = s.sizes([want[i] for i in axes])
            updates = s.op("Slice", updates, s.const([0] * len(axes)), ends, s.const(axes))
    put = s.op("ScatterElements", at_least_1d(s, source, dtype), positions, updates, axis=axis, name=node.name)
    return as_node(s, put, node)


def _replace(s: Scope, node: fx.Node, axis: int, positions: list[int], src: ir.Value) -> ir.Value:
    """Positions along an axis replaced by the slices of `src`: one Gather from both tensors joined."""
    source: Any = node.args[0]
    size = fixed(s.dims(source)[axis], "the size of the dimension")
    table = list(range(size))
    for number, position in enumerate(positions):
        table[position] = size + number
    joined = s.op("Concat", s.value(source), src, axis=axis)
    return s.op("Gather", joined, s.const(table), axis=axis, name=node.name)


def _select_scatter(s: Scope, node: fx.Node) -> Emitted:
    axis = axis_of(s, node.args[0], argument(node, 2, "dim"))
    size = fixed(s.dims(node)[axis], "select_scatter: the size of the dimension")
    src = s.op("Unsqueeze", s.value(node.args[1], s.dtype(node)), s.const([axis]))
    return _replace(s, node, axis, [int(argument(node, 3, "index")) % size], src)


def _slice_scatter(s: Scope, node: fx.Node) -> Emitted:
    source, src = node.args[0], node.args[1]
    axis = axis_of(s, source, argument(node, 2, "dim", 0))
    start, end, step = (s.plain(argument(node, i, n)) for i, n in ((3, "start"), (4, "end"), (5, "step")))
    value = s.value(src, s.dtype(node))
    if s.dims(src) == s.dims(source):  # type: ignore[arg-type]
        return value
    size = fixed(s.dims(node)[axis], "slice_scatter: the size of the dimension")
    start, end = (None if v is None else fixed(v, "slice_scatter: an end") for v in (start, end))
    return _replace(s, node, axis, list(range(size))[slice(start, end, step)], value)


def _diagonal(s: Scope, node: fx.Node) -> Emitted:
    """The two dimensions flattened at the end, then a Gather of every ``columns + 1``-th element."""
    source: Any = node.args[0]
    offset, first, second = (
        int(argument(node, i, n, d)) for i, n, d in ((1, "offset", 0), (2, "dim1", 0), (3, "dim2", 1))
    )
    axes = [axis_of(s, source, d) for d in (first, second)]
    have = s.dims(source)
    rows, columns = (fixed(have[a], "diagonal: a size of the matrix") for a in axes)
    rest = [d for d in range(len(have)) if d not in axes]
    moved = transpose(s, s.value(source), rest + axes)
    left = [have[d] for d in rest]
    flat = s.reshape(moved, [*left, Dim(rows * columns)], left)
    positions = torch.arange(rows * columns).reshape(rows, columns).diagonal(offset)
    return s.op("Gather", flat, s.const(positions.contiguous()), axis=len(rest), name=node.name)


def _bucketize(s: Scope, node: fx.Node) -> Emitted:
    right = bool(argument(node, 3, "right", False))
    return _count_below(s, node, node.args[1], node.args[0], right)


def _searchsorted(s: Scope, node: fx.Node) -> Emitted:
    if node.kwargs.get("sorter") is not None:
        raise ExportError("searchsorted: sorter has no ONNX form here")
    right = node.kwargs.get("side") == "right" or bool(node.kwargs.get("right", False))
    return _count_below(s, node, node.args[0], node.args[1], right)


def _count_below(s: Scope, node: fx.Node, borders: Any, values: Any, right: bool) -> ir.Value:
    """Position among sorted borders: how many of them are not beyond (right: or equal to) each value."""
    dtype = wide(torch.promote_types(s.dtype(borders), s.dtype(values)))
    rows = s.value(borders, dtype)
    if s.rank(borders) > 1:
        rows = s.op("Unsqueeze", rows, s.const([-2]))
    value = s.op("Unsqueeze", s.value(values, dtype), s.const([-1]))
    beyond = s.op("Greater" if right else "GreaterOrEqual", rows, value)
    counted = s.op("Cast", s.op("Not", beyond), to=ir.DataType.INT64)
    count = s.op("ReduceSum", counted, s.const([-1]), keepdims=0, name=node.name)
    return cast(s, count, torch.int64, s.dtype(node))


TABLE: dict[str, Emitter] = {
    "aten.embedding.default": _embedding,
    "aten.index_select.default": _index_select,
    "aten.gather.default": _gather,
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.scatter.src": _scatter,
    "aten.scatter.value": _scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.diagonal.default": _diagonal,
    "aten.bucketize.Tensor": _bucketize,
    "aten.searchsorted.Tensor": _searchsorted,
}
