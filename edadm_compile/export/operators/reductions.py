"""Sums, means, extremes, variances, softmax, sorting."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.export.operators.operands import as_node, at_least_1d, axes_of, axis_of, cast, fixed, times, wide
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def reduced(
    s: Scope, op_type: str, value: ir.Value, axes: list[int], keepdim: bool, name: str = "", **attributes: Any
) -> ir.Value:
    """A Reduce node; the axes are always given, since none would mean all."""
    return s.op(op_type, value, s.const(axes), keepdims=int(keepdim), name=name, **attributes)


def _finish(s: Scope, node: fx.Node, value: ir.Value) -> ir.Value:
    """The reduction of a tensor without dimensions has none either."""
    return value if s.rank(node.args[0]) else s.reshape(value, ())  # type: ignore[arg-type]


def reduction(op_type: str, has_dims: bool = True) -> Emitter:
    """A reduction over the dimensions in the second argument, or all; computed in the type of the result."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype = s.dtype(node)
        work = wide(dtype)
        dims = argument(node, 1, "dim") if has_dims else None
        keepdim = bool(argument(node, 2, "keepdim", False)) if has_dims else False
        x = at_least_1d(s, node.args[0], work)
        axes = axes_of(s, node.args[0], dims)
        result = reduced(s, op_type, x, axes, keepdim, name=node.name)
        return _finish(s, node, cast(s, result, work, dtype))

    return emit


def _truth(op_type: str) -> Emitter:
    """All as the minimum, any as the maximum of 0 and 1."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        source = node.args[0]
        bits = cast(s, at_least_1d(s, source, torch.bool), torch.bool, torch.int32)
        result = reduced(s, op_type, bits, axes_of(s, source, None), False, name=node.name)
        return _finish(s, node, cast(s, result, torch.int32, s.dtype(node)))

    return emit


def variance(s: Scope, source: Any, dims: Any, correction: float, keepdim: bool) -> tuple[ir.Value, ir.Value]:
    """(variance, mean): sum of squared distances from the mean, over the count less the correction, at least 0."""
    dtype, axes = s.dtype(source), axes_of(s, source, dims)
    x = at_least_1d(s, source)
    mean = reduced(s, "ReduceMean", x, axes, True)
    distance = s.op("Sub", x, mean)
    total = reduced(s, "ReduceSum", s.op("Mul", distance, distance), axes, keepdim)
    sizes = s.dims(source)
    count = times([sizes[a] for a in axes] if sizes else [])
    if count.is_fixed:
        divisor = s.value(float(max(0, count.fixed - correction)), dtype)
    else:
        less = s.op("Sub", cast(s, s.reshape(s.size(count), ()), torch.int64, dtype), s.value(float(correction), dtype))
        divisor = s.op("Max", less, s.value(0.0, dtype))
    return s.op("Div", total, divisor), mean if keepdim else s.op("Squeeze", mean, s.const(axes))


def _correction(node: fx.Node) -> float:
    if "unbiased" in node.kwargs or (len(node.args) > 2):
        return float(bool(argument(node, 2, "unbiased", True)))
    given = node.kwargs.get("correction")
    return 1.0 if given is None else float(given)  # type: ignore[arg-type]


def _spread(root: bool, keepdim_at: int = 3, with_mean: bool = False) -> Emitter:
    """Variance or standard deviation."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        keepdim = bool(argument(node, keepdim_at, "keepdim", False))
        result, mean = variance(s, node.args[0], argument(node, 1, "dim"), _correction(node), keepdim)
        result = _finish(s, node, s.op("Sqrt", result) if root else result)
        return (result, _finish(s, node, mean)) if with_mean else result

    return emit


def _along(op_type: str) -> Emitter:
    """A function along one axis that keeps the shape."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        x = at_least_1d(s, node.args[0], s.dtype(node))
        axis = axis_of(s, node.args[0], argument(node, 1, "dim"))
        return as_node(s, s.op(op_type, x, axis=axis, name=node.name), node)

    return emit


def _cumsum(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    work = wide(dtype)
    x = at_least_1d(s, node.args[0], work)
    axis = s.const(axis_of(s, node.args[0], argument(node, 1, "dim")))
    return as_node(s, cast(s, s.op("CumSum", x, axis, name=node.name), work, dtype), node)


def _argmax(s: Scope, node: fx.Node) -> Emitted:
    """The first of equal ones; without a dimension the position in the flattened tensor."""
    source, dim = node.args[0], argument(node, 1, "dim")
    keepdim = bool(argument(node, 2, "keepdim", False))
    x = at_least_1d(s, source, wide(s.dtype(source)))
    if dim is None:
        flat = s.op("Reshape", x, s.const([-1]))
        return s.reshape(s.op("ArgMax", flat, axis=0, keepdims=1, name=node.name), s.dims(node))
    result = s.op("ArgMax", x, axis=axis_of(s, source, dim), keepdims=int(keepdim), name=node.name)
    return _finish(s, node, result)


def _topk(s: Scope, node: fx.Node) -> Emitted:
    source, dtype = node.args[0], s.dtype(node.args[0])
    count = Dim(fixed(s.plain(argument(node, 1, "k")), "topk: k"))
    axis, largest = axis_of(s, source, argument(node, 2, "dim", -1)), int(argument(node, 3, "largest", True))
    x = at_least_1d(s, source, wide(dtype))
    values, places = s.builder.ops("TopK", x, s.size(count), outputs=2, axis=axis, largest=largest, name=node.name)
    return _finish(s, node, cast(s, values, wide(dtype), dtype)), _finish(s, node, places)


TABLE: dict[str, Emitter] = {
    "aten.mean.default": reduction("ReduceMean", has_dims=False),
    "aten.mean.dim": reduction("ReduceMean"),
    "aten.sum.default": reduction("ReduceSum", has_dims=False),
    "aten.sum.dim_IntList": reduction("ReduceSum"),
    "aten.amax.default": reduction("ReduceMax"),
    "aten.amin.default": reduction("ReduceMin"),
    "aten.max.default": reduction("ReduceMax", has_dims=False),
    "aten.min.default": reduction("ReduceMin", has_dims=False),
    "aten.prod.dim_int": reduction("ReduceProd"),
    "aten.logsumexp.default": reduction("ReduceLogSumExp"),
    "aten.all.default": _truth("ReduceMin"),
    "aten.any.default": _truth("ReduceMax"),
    "aten.var.correction": _spread(root=False),
    "aten.var.dim": _spread(root=False),
    "aten.std.correction": _spread(root=True),
    "aten.std.dim": _spread(root=True),
    "aten.var_mean.correction": _spread(root=False, with_mean=True),
    "aten.softmax.int": _along("Softmax"),
    "aten._softmax.default": _along("Softmax"),
    "aten.log_softmax.int": _along("LogSoftmax"),
    "aten.cumsum.default": _cumsum,
    "aten.argmax.default": _argmax,
    "aten.topk.default": _topk,
}
