"""Normalizations, in the forms that ONNX Runtime runs fastest, and vector norms."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.operands import (
    at_least_1d,
    axes_of,
    axis_of,
    cast,
    fixed,
    refuse_items,
    times,
    used,
)
from edadm_compile.export.operators.reductions import reduced
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _or_constant(s: Scope, arg: Any, value: int, size: int, dtype: torch.dtype) -> ir.Value:
    """A parameter, or `size` times a number where it is None."""
    return s.const(torch.full((size,), value), dtype) if arg is None else s.value(arg, dtype)


def _channels(s: Scope, source: Any) -> int:
    return fixed(s.dims(source)[1], "the number of channels")


def _scaled(s: Scope, node: fx.Node, x: ir.Value, weight: Any, bias: Any) -> ir.Value:
    """``x * weight + bias`` per channel (dimension 1), as one BatchNormalization with mean 0 and variance 1."""
    if weight is None and bias is None:
        return x
    count, dtype = _channels(s, node.args[0]), s.dtype(node.args[0])
    gamma, beta = _or_constant(s, weight, 1, count, dtype), _or_constant(s, bias, 0, count, dtype)
    zeros, ones = _or_constant(s, None, 0, count, dtype), _or_constant(s, None, 1, count, dtype)
    return s.op("BatchNormalization", x, gamma, beta, zeros, ones, epsilon=0.0, name=node.name)


def _normalized_groups(s: Scope, node: fx.Node, groups: int, eps: float) -> tuple[ir.Value, ir.Value]:
    """(x with mean 0 and variance 1 per group in its own shape, x as [B, groups, rest])."""
    source: Any = node.args[0]
    have = s.dims(source)
    parts = [have[0], Dim(groups), Dim(fixed(times(have[1:]), "group_norm: the size of a group") // groups)]
    grouped = s.reshape(s.value(source), parts, have)
    ones, zeros = (_or_constant(s, None, v, groups, s.dtype(source)) for v in (1, 0))
    even = s.op("InstanceNormalization", grouped, ones, zeros, epsilon=float(eps))
    return s.reshape(even, have, parts), grouped


def _group_norm(s: Scope, node: fx.Node) -> Emitted:
    weight, bias, eps = (
        argument(node, i, n, d) for i, n, d in ((2, "weight", None), (3, "bias", None), (4, "eps", 1e-5))
    )
    even, _ = _normalized_groups(s, node, int(argument(node, 1, "num_groups")), eps)
    return _scaled(s, node, even, weight, bias)


def _native_group_norm(s: Scope, node: fx.Node) -> Emitted:
    """(result, mean [B, groups], 1 / deviation [B, groups]); the last two only where they are read."""
    weight, bias, groups, eps = (node.args[i] for i in (1, 2, 6, 7))
    even, grouped = _normalized_groups(s, node, int(groups), float(eps))  # type: ignore[arg-type]
    result = _scaled(s, node, even, weight, bias)
    if not (used(node, 1) or used(node, 2)):
        return (result,)
    mean = reduced(s, "ReduceMean", grouped, [2], True)
    distance = s.op("Sub", grouped, mean)
    spread = reduced(s, "ReduceMean", s.op("Mul", distance, distance), [2], False)
    root = s.op("Sqrt", s.op("Add", spread, s.value(float(eps), s.dtype(node.args[0]))))  # type: ignore[arg-type]
    return result, s.op("Squeeze", mean, s.const([2])), s.op("Reciprocal", root)


def _layer_norm(s: Scope, node: fx.Node, eps: float, outputs: int = 1) -> tuple[ir.Value, ...]:
    """LayerNormalization over the trailing dimensions. Without a bias the third input must be left off, not empty."""
    source, shape = node.args[0], [int(n) for n in argument(node, 1, "normalized_shape")]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    dtype = s.dtype(source)
    scale = s.const(torch.ones(shape), dtype) if weight is None else s.value(weight, dtype)
    inputs = [s.value(source), scale] + ([] if bias is None else [s.value(bias, dtype)])
    return s.builder.ops(
        "LayerNormalization", *inputs, outputs=outputs, axis=-len(shape), epsilon=float(eps), name=node.name
    )


def _native_layer_norm(s: Scope, node: fx.Node) -> Emitted:
    outputs = 3 if used(node, 1) or used(node, 2) else 1
    return _layer_norm(s, node, argument(node, 4, "eps"), outputs)


def _by_statistics(s: Scope, node: fx.Node, mean: Any, variance_: Any, eps: float) -> ir.Value:
    """BatchNormalization with stored statistics."""
    count, dtype = _channels(s, node.args[0]), s.dtype(node.args[0])
    weight, bias = (
        _or_constant(s, argument(node, i, n), d, count, dtype) for i, n, d in ((1, "weight", 1), (2, "bias", 0))
    )
    statistics = (s.value(v, dtype) for v in (mean, variance_))
    x = s.value(node.args[0])
    return s.op("BatchNormalization", x, weight, bias, *statistics, epsilon=float(eps), name=node.name)


def _batch_norm(s: Scope, node: fx.Node) -> Emitted:
    if argument(node, 5, "training", False):
        raise ExportError("batch_norm: training=True has no ONNX form; capture the model in eval mode")
    return _by_statistics(s, node, node.args[3], node.args[4], float(argument(node, 7, "eps")))


def _native_batch_norm(s: Scope, node: fx.Node) -> Emitted:
    refuse_items(node, (1, 2), "the (empty) saved statistics")
    return (_by_statistics(s, node, node.args[3], node.args[4], float(argument(node, 6, "eps"))),)


def _instance_norm(s: Scope, node: fx.Node) -> Emitted:
    weight, bias = (argument(node, i, n) for i, n in ((1, "weight"), (2, "bias")))
    eps = float(argument(node, 7, "eps"))
    if not argument(node, 5, "use_input_stats"):
        return _by_statistics(s, node, node.args[3], node.args[4], eps)
    count, dtype = _channels(s, node.args[0]), s.dtype(node)
    scale, shift = _or_constant(s, weight, 1, count, dtype), _or_constant(s, bias, 0, count, dtype)
    return s.op("InstanceNormalization", s.value(node.args[0]), scale, shift, epsilon=eps, name=node.name)


def _rms_norm(s: Scope, node: fx.Node) -> Emitted:
    """``x / sqrt(mean(x^2) + eps) * weight``; eps defaults to the distance of 1 from the next number."""
    source, shape = node.args[0], argument(node, 1, "normalized_shape")
    weight, eps, dtype = argument(node, 2, "weight"), argument(node, 3, "eps"), s.dtype(node.args[0])
    x, rank = s.value(source), s.rank(source)  # type: ignore[arg-type]
    axes = list(range(rank - len(shape), rank))
    power = reduced(s, "ReduceMean", s.op("Mul", x, x), axes, True)
    shifted = s.op("Add", power, s.value(float(torch.finfo(dtype).eps if eps is None else eps), dtype))
    result = s.op("Mul", x, s.op("Reciprocal", s.op("Sqrt", shifted)), name=node.name)
    return result if weight is None else cast(s, s.op("Mul", result, s.value(weight, dtype)), dtype, s.dtype(node))


def vector_norm(
    s: Scope, x: ir.Value, order: float, axes: list[int], keepdim: bool, dtype: torch.dtype, name: str = ""
) -> ir.Value:
    """``sum(|x|^order)^(1/order)`` and its limits."""
    if order in (1, 2):
        return reduced(s, f"ReduceL{int(order)}", x, axes, keepdim, name=name)
    size = s.op("Abs", x)
    if math.isinf(order):
        return reduced(s, "ReduceMax" if order > 0 else "ReduceMin", size, axes, keepdim, name=name)
    if order == 0:
        some = s.op("Not", s.op("Equal", x, s.value(0, dtype)))
        return reduced(s, "ReduceSum", cast(s, some, torch.bool, dtype), axes, keepdim, name=name)
    total = reduced(s, "ReduceSum", s.op("Pow", size, s.value(float(order), dtype)), axes, keepdim)
    return s.op("Pow", total, s.value(1 / order, dtype), name=name)


def _norm(order_name: str) -> Emitter:
    """A norm with (order, dimensions, keepdim) as its arguments after the tensor."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        source, dtype = node.args[0], s.dtype(node)
        order = argument(node, 1, order_name, 2)
        axes, keepdim = axes_of(s, source, argument(node, 2, "dim")), bool(argument(node, 3, "keepdim", False))
        x = at_least_1d(s, source, dtype)
        result = vector_norm(s, x, 2.0 if order is None else float(order), axes, keepdim, dtype, name=node.name)
        return result if s.rank(source) else s.reshape(result, ())  # type: ignore[arg-type]

    return emit


def _weight_norm(s: Scope, node: fx.Node) -> Emitted:
    """``v * (g / norm of v over all dimensions but one)``; dimension -1 stands for none left out."""
    v, g, dim = node.args[0], node.args[1], int(argument(node, 2, "dim", 0))
    rank = s.rank(v)  # type: ignore[arg-type]
    kept = None if dim == -1 else axis_of(s, v, dim)
    axes = [a for a in range(rank) if a != kept]
    norm = reduced(s, "ReduceL2", s.value(v), axes, kept is not None)
    return s.op("Mul", s.value(v), s.op("Div", s.value(g), norm), name=node.name)


TABLE: dict[str, Emitter] = {
    "aten.group_norm.default": _group_norm,
    "aten.native_group_norm.default": _native_group_norm,
    "aten.layer_norm.default": lambda s, node: _layer_norm(s, node, argument(node, 4, "eps", 1e-5))[0],
    "aten.native_layer_norm.default": _native_layer_norm,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _native_batch_norm,
    "aten.instance_norm.default": _instance_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.linalg_vector_norm.default": _norm("ord"),
    "aten.norm.ScalarOpt_dim": _norm("p"),
    "aten.norm.Scalar": _norm("p"),
    "aten._weight_norm.default": _weight_norm,
}
