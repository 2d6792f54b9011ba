"""Operators of one element at a time: one-to-one functions, types, comparisons, logic, choices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edadm_compile.export.operators.operands import cast, promoted, select, wide
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def unary(op_type: str, **attributes: Any) -> Emitter:
    """A function of one tensor, computed in the type of the result."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype = s.dtype(node)
        work = wide(dtype)
        result = s.op(op_type, s.value(node.args[0], work), name=node.name, **attributes)
        return cast(s, result, work, dtype)

    return emit


def rounding(op_type: str) -> Emitter:
    """A rounding to whole numbers, which integers already are."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        if not s.dtype(node).is_floating_point:
            return s.value(node.args[0])
        return s.op(op_type, s.value(node.args[0]), name=node.name)

    return emit


def comparison(op_type: str, negated: bool = False) -> Emitter:
    """A comparison in the common type of both operands."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        a, b = argument(node, 0, "self"), argument(node, 1, "other")
        dtype = wide(promoted(s, a, b))
        result = s.op(op_type, s.value(a, dtype), s.value(b, dtype), name=node.name)
        return s.op("Not", result) if negated else result

    return emit


def logical(op_type: str) -> Emitter:
    """And, Or or Not of truth values; numbers other than 0 are true."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        return s.op(op_type, *(s.value(a, torch.bool) for a in node.args), name=node.name)

    return emit


def bitwise(op_type: str, on_bool: str) -> Emitter:
    """An operation on bits, which has another name for truth values."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype = s.dtype(node)
        chosen = on_bool if dtype == torch.bool else op_type
        return s.op(chosen, *(s.value(a, dtype) for a in node.args), name=node.name)

    return emit


def _convert(s: Scope, node: fx.Node) -> Emitted:
    source = node.args[0]
    return cast(s, s.value(source), s.dtype(source), s.dtype(node))


def _where(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    condition = s.value(node.args[0], torch.bool)
    a, b = (s.value(argument(node, i, n), dtype) for i, n in ((1, "self"), (2, "other")))
    return select(s, condition, a, b, dtype, name=node.name)


def _masked_fill(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    mask, value = s.value(node.args[1], torch.bool), s.value(argument(node, 2, "value"), dtype)
    return select(s, mask, value, s.value(node.args[0], dtype), dtype, name=node.name)


def _sign(s: Scope, node: fx.Node) -> Emitted:
    return s.value(node.args[0]) if s.dtype(node) == torch.bool else unary("Sign")(s, node)


def _is_nan(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node.args[0])
    return s.op("IsNaN", s.value(node.args[0], dtype if dtype.is_floating_point else torch.float32), name=node.name)


def _nan_to_num(s: Scope, node: fx.Node) -> Emitted:
    dtype, x = s.dtype(node), s.value(node.args[0])
    if not dtype.is_floating_point:
        return x
    limits = torch.finfo(dtype)
    nan, high, low = (argument(node, i + 1, n) for i, n in enumerate(("nan", "posinf", "neginf")))
    high = limits.max if high is None else high
    low = limits.min if low is None else low
    result = select(s, s.op("IsNaN", x), s.value(float(nan or 0), dtype), x, dtype)
    result = select(s, s.op("IsInf", x, detect_negative=0), s.value(float(high), dtype), result, dtype)
    return select(s, s.op("IsInf", x, detect_positive=0), s.value(float(low), dtype), result, dtype, name=node.name)


_UNARY = {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "reciprocal": "Reciprocal", "sin": "Sin",
    "cos": "Cos", "tan": "Tan", "tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf",
}  # fmt: skip
_COMPARISONS = {
    "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "le": ("LessOrEqual", False),
    "gt": ("Greater", False), "ge": ("GreaterOrEqual", False),
}  # fmt: skip
_CONVERSIONS = ("_to_copy.default", "to.dtype", "to.dtype_layout", "to.device", "type_as.default")

TABLE: dict[str, Emitter] = {
    **{f"aten.{name}.default": unary(op_type) for name, op_type in _UNARY.items()},
    **{f"aten.{name}.default": rounding(name.title()) for name in ("floor", "ceil", "round")},
    **{f"aten.{n}.{o}": comparison(*how) for n, how in _COMPARISONS.items() for o in ("Tensor", "Scalar")},
    **{f"aten.logical_{name}.default": logical(name.title()) for name in ("and", "or", "not")},
    **{f"aten.bitwise_{name}.Tensor": bitwise(f"Bitwise{name.title()}", name.title()) for name in ("and", "or")},
    "aten.bitwise_not.default": bitwise("BitwiseNot", "Not"),
    **{f"aten.where.{o}": _where for o in ("self", "ScalarOther", "ScalarSelf", "Scalar")},
    **{f"aten.masked_fill.{o}": _masked_fill for o in ("Scalar", "Tensor")},
    **{f"aten.{name}": _convert for name in _CONVERSIONS},
    "aten.sign.default": _sign,
    "aten.isnan.default": _is_nan,
    "aten.nan_to_num.default": _nan_to_num,
}  # fmt: skip
