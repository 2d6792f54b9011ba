"""Activation functions."""

from __future__ import annotations

from typing import Any

from torch import fx

from edadm_compile.export.operators.arithmetic import clipped
from edadm_compile.export.operators.elementwise import unary
from edadm_compile.export.operators.operands import axis_of, fixed
from edadm_compile.export.operators.powers import expm1
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def parametrised(op_type: str, **arguments: tuple[int, str, float]) -> Emitter:
    """A one-to-one function whose attributes are (position, name, default) of torch's arguments."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        attributes = {name: float(argument(node, *where)) for name, where in arguments.items()}
        return s.op(op_type, s.value(node.args[0]), name=node.name, **attributes)

    return emit


def _relu(s: Scope, node: fx.Node) -> Emitted:
    return unary("Relu")(s, node) if s.dtype(node).is_floating_point else clipped(s, node, 0, None)


def _silu(s: Scope, node: fx.Node) -> Emitted:
    """As a product: ONNX Runtime fuses it."""
    x = s.value(node.args[0])
    return s.op("Mul", x, s.op("Sigmoid", x), name=node.name)


def _gelu(s: Scope, node: fx.Node) -> Emitted:
    return s.op("Gelu", s.value(node.args[0]), approximate=argument(node, 1, "approximate", "none"), name=node.name)


def _elu(s: Scope, node: fx.Node) -> Emitted:
    """``scale * x`` above 0, ``scale * alpha * (exp(input_scale * x) - 1)`` below."""
    alpha, scale, input_scale = (argument(node, i, n, 1) for i, n in ((1, "alpha"), (2, "scale"), (3, "input_scale")))
    if scale == input_scale == 1:
        return s.op("Elu", s.value(node.args[0]), alpha=float(alpha), name=node.name)
    dtype, x = s.dtype(node), s.value(node.args[0])
    below = expm1(s, s.op("Mul", x, s.value(input_scale, dtype)), dtype)
    below = s.op("Mul", below, s.value(alpha * scale, dtype))
    above = s.op("Mul", x, s.value(scale, dtype))
    return s.op("Where", s.op("Less", x, s.value(0, dtype)), below, above, name=node.name)


def _softplus(s: Scope, node: fx.Node) -> Emitted:
    """``log(1 + exp(beta x)) / beta``, and x where ``beta x`` is beyond the threshold."""
    beta, threshold = argument(node, 1, "beta", 1), argument(node, 2, "threshold", 20)
    dtype, x = s.dtype(node), s.value(node.args[0])
    scaled = x if beta == 1 else s.op("Mul", x, s.value(beta, dtype))
    result = s.op("Softplus", scaled, name=node.name)
    result = result if beta == 1 else s.op("Div", result, s.value(beta, dtype))
    if threshold >= 20:  # log(1 + exp(y)) rounds to y from there on anyway
        return result
    return s.op("Where", s.op("Greater", scaled, s.value(threshold, dtype)), x, result)


def _log_sigmoid(s: Scope, node: fx.Node) -> Emitted:
    return s.op("Neg", s.op("Softplus", s.op("Neg", s.value(node.args[0]))), name=node.name)


def _mish(s: Scope, node: fx.Node) -> Emitted:
    x = s.value(node.args[0])
    return s.op("Mul", x, s.op("Tanh", s.op("Softplus", x)), name=node.name)


def _hardtanh(s: Scope, node: fx.Node) -> Emitted:
    return clipped(s, node, argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1))


def _hard_sixth(times_x: bool) -> Emitter:
    """``min(max(x + 3, 0), 6) / 6``, for hardswish times x, in torch's order."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype, x = s.dtype(node), s.value(node.args[0])
        shifted = s.op("Add", x, s.value(3, dtype))
        ramp = s.op("Clip", shifted, s.value(0, dtype), s.value(6, dtype))
        return s.op("Div", s.op("Mul", x, ramp) if times_x else ramp, s.value(6, dtype), name=node.name)

    return emit


def _prelu(s: Scope, node: fx.Node) -> Emitted:
    """The slope belongs to dimension 1."""
    source: Any = node.args[0]
    slope = s.op("Reshape", s.value(node.args[1]), s.const([-1] + [1] * (s.rank(source) - 2)))
    return s.op("PRelu", s.value(source), slope, name=node.name)


def _threshold(s: Scope, node: fx.Node) -> Emitted:
    dtype, x = s.dtype(node), s.value(node.args[0])
    limit, value = (s.value(argument(node, i, n), dtype) for i, n in ((1, "threshold"), (2, "value")))
    return s.op("Where", s.op("LessOrEqual", x, limit), value, x, name=node.name)


def _glu(s: Scope, node: fx.Node) -> Emitted:
    source, dim = node.args[0], argument(node, 1, "dim", -1)
    axis = axis_of(s, source, dim)
    half = fixed(s.dims(source)[axis], "glu: the halved size") // 2  # type: ignore[arg-type]
    a, b = s.builder.ops("Split", s.value(source), s.const([half, half]), outputs=2, axis=axis)
    return s.op("Mul", a, s.op("Sigmoid", b), name=node.name)


TABLE: dict[str, Emitter] = {
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.relu.default": _relu,
    "aten.relu6.default": lambda s, node: clipped(s, node, 0, 6),
    "aten.leaky_relu.default": parametrised("LeakyRelu", alpha=(1, "negative_slope", 0.01)),
    "aten.elu.default": _elu,
    "aten.selu.default": unary("Selu"),
    "aten.celu.default": parametrised("Celu", alpha=(1, "alpha", 1.0)),
    "aten.mish.default": _mish,
    "aten.softplus.default": _softplus,
    "aten.hardtanh.default": _hardtanh,
    "aten.hardswish.default": _hard_sixth(times_x=True),
    "aten.hardsigmoid.default": _hard_sixth(times_x=False),
    "aten.prelu.default": _prelu,
    "aten.log_sigmoid.default": _log_sigmoid,
    "aten.threshold.default": _threshold,
    "aten.glu.default": _glu,
}
