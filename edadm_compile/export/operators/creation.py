"""Tensors made from numbers, and tensors joined: constants where all sizes are fixed."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.movement import expanded
from edadm_compile.export.operators.operands import axis_of, broadcast, cast, fixed, scalar, select
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def filled(s: Scope, node: fx.Node, value: Any) -> ir.Value:
    """One number everywhere, in the shape and type of the node."""
    number = s.value(value, s.dtype(node))
    return s.op("Expand", number, s.sizes(s.dims(node)), name=node.name) if s.rank(node) else number


def _number(value: int) -> Emitter:
    return lambda s, node: filled(s, node, value)


def _given(position: int) -> Emitter:
    return lambda s, node: filled(s, node, argument(node, position, "fill_value"))


def _scalar_tensor(s: Scope, node: fx.Node) -> Emitted:
    return s.value(argument(node, 0, "s"), s.dtype(node))


def _arange(s: Scope, node: fx.Node) -> Emitted:
    """A constant, or Range where an end depends on the batch."""
    given = s.plain(list(node.args))
    start, end, step = (0, given[0], 1) if len(given) == 1 else (*given, 1)[:3]
    dtype = s.dtype(node)
    if not any(isinstance(v, Dim) for v in (start, end, step)):
        return s.const(torch.arange(start, end, step, dtype=dtype))
    if any(isinstance(v, float) for v in (start, end, step)):
        raise ExportError("arange: a fraction together with a size that depends on the batch has no ONNX form")
    made = s.op("Range", *(scalar(s, v) for v in (start, end, step)), name=node.name)
    return cast(s, made, torch.int64, dtype)


def _linspace(s: Scope, node: fx.Node) -> Emitted:
    start, end, steps = (s.plain(argument(node, i, n)) for i, n in enumerate(("start", "end", "steps")))
    count = fixed(steps, "linspace: the number of steps")
    return s.const(torch.linspace(start, end, count, dtype=s.dtype(node)))


def _meshgrid(s: Scope, node: fx.Node) -> Emitted:
    tensors: Any = node.args[0]
    lengths = [s.dims(t)[0] if s.rank(t) else Dim(1) for t in tensors]
    places = list(range(len(tensors)))
    if argument(node, 1, "indexing", "ij") == "xy" and len(places) > 1:
        places[:2] = [1, 0]
    full = [lengths[places.index(i)] for i in range(len(tensors))]
    results = []
    for tensor, length, place in zip(tensors, lengths, places, strict=True):
        shape = [length if i == place else Dim(1) for i in range(len(tensors))]
        results.append(expanded(s, s.reshape(s.value(tensor), shape), shape, full))
    return tuple(results)


def _cat(s: Scope, node: fx.Node) -> Emitted:
    """Concat in the common type; tensors of shape [0] take no part, whatever the others' rank."""
    tensors: Any = argument(node, 0, "tensors")
    kept = [t for t in tensors if not (s.rank(t) == 1 and s.dims(t)[0] == Dim(0))] or list(tensors)
    values = [s.value(t, s.dtype(node)) for t in kept]
    dim = argument(node, 1, "dim", 0)
    return s.op("Concat", *values, axis=axis_of(s, node, dim), name=node.name)


def _hstack(s: Scope, node: fx.Node) -> Emitted:
    """Along dimension 1; along 0 for vectors and numbers."""
    tensors: Any = node.args[0]
    values = [s.value(t, s.dtype(node)) for t in tensors]
    values = [v if s.rank(t) else s.reshape(v, [Dim(1)]) for v, t in zip(values, tensors, strict=True)]
    return s.op("Concat", *values, axis=min(s.rank(node), 2) - 1, name=node.name)


def _stack(s: Scope, node: fx.Node) -> Emitted:
    tensors: Any = node.args[0]
    axis = axis_of(s, node, argument(node, 1, "dim", 0))
    values = [s.op("Unsqueeze", s.value(t, s.dtype(node)), s.const([axis])) for t in tensors]
    return s.op("Concat", *values, axis=axis, name=node.name)


def _triangle(upper: bool) -> Emitter:
    """Zero below or above a diagonal of the last two dimensions, by a constant mask."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        rows, columns = (fixed(d, "triangle: a size of the matrix") for d in s.dims(node)[-2:])
        diagonal = int(argument(node, 1, "diagonal", 0))
        ones = torch.ones(rows, columns, dtype=torch.bool)
        mask = s.const(ones.triu(diagonal) if upper else ones.tril(diagonal))
        dtype = s.dtype(node)
        return select(s, mask, s.value(node.args[0]), s.value(0, dtype), dtype, name=node.name)

    return emit


def _one_hot(s: Scope, node: fx.Node) -> Emitted:
    """A comparison with 0, 1, ..., n - 1."""
    count = int(argument(node, 1, "num_classes"))
    labels = s.op("Unsqueeze", s.value(node.args[0]), s.const([-1]))
    hits = s.op("Equal", labels, s.const(torch.arange(count)))
    return s.op("Cast", hits, to=ir.DataType.INT64, name=node.name)


def _copy(s: Scope, node: fx.Node) -> Emitted:
    """The second tensor in shape and type of the first."""
    source: Any = argument(node, 1, "src")
    value = s.value(source, s.dtype(node))
    return expanded(s, value, s.dims(source), broadcast(s.dims(node), s.dims(source)), name=node.name)


TABLE: dict[str, Emitter] = {
    **{f"aten.{name}.default": _number(0) for name in ("zeros", "zeros_like", "new_zeros", "empty_like")},
    **{f"aten.{name}.default": _number(1) for name in ("ones", "ones_like", "new_ones")},
    **{f"aten.{name}.default": _given(i) for name, i in (("full", 1), ("full_like", 1), ("new_full", 2))},
    **{f"aten.arange.{overload}": _arange for overload in ("default", "start", "start_step")},
    "aten.scalar_tensor.default": _scalar_tensor,
    "aten.linspace.default": _linspace,
    "aten.meshgrid.indexing": _meshgrid,
    "aten.cat.default": _cat,
    "aten.concat.default": _cat,
    "aten.hstack.default": _hstack,
    "aten.stack.default": _stack,
    "aten.tril.default": _triangle(upper=False),
    "aten.triu.default": _triangle(upper=True),
    "aten.one_hot.default": _one_hot,
    "aten.copy.default": _copy,
}
