"""Arithmetic of two and three tensors, with torch's type promotion and rounding modes."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.export.operators.operands import cast, wide
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _operands(s: Scope, node: fx.Node) -> tuple[ir.Value, ir.Value, torch.dtype]:
    """Both operands in the type of computation, and that type."""
    work = wide(s.dtype(node))
    a, b = (s.value(argument(node, i, n), work) for i, n in enumerate(("self", "other")))
    return a, b, work


def binary(op_type: str, on_bool: str | None = None) -> Emitter:
    """A function of two operands, computed in the type of the result."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype = s.dtype(node)
        if on_bool and dtype == torch.bool:
            return s.op(on_bool, *(s.value(a, dtype) for a in node.args), name=node.name)
        a, b, work = _operands(s, node)
        return cast(s, s.op(op_type, a, b, name=node.name), work, dtype)

    return emit


def weighted(op_type: str, swapped: bool = False) -> Emitter:
    """``a ± alpha b``; swapped: ``b - alpha a``."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype, alpha = s.dtype(node), argument(node, 2, "alpha", 1)
        if dtype == torch.bool and op_type == "Add" and alpha == 1:
            return s.op("Or", *(s.value(a, dtype) for a in node.args[:2]), name=node.name)
        a, b, work = _operands(s, node)
        if swapped:
            a, b = b, a
        if alpha != 1:
            b = s.op("Mul", b, s.value(alpha, work))
        return cast(s, s.op(op_type, a, b, name=node.name), work, dtype)

    return emit


def _truncated(s: Scope, x: ir.Value, dtype: torch.dtype, name: str) -> ir.Value:
    """The whole part of floats."""
    return s.op("Where", s.op("Less", x, s.value(0, dtype)), s.op("Ceil", x), s.op("Floor", x), name=name)


def _signs_differ(s: Scope, a: ir.Value, b: ir.Value, dtype: torch.dtype) -> ir.Value:
    zero = s.value(0, dtype)
    return s.op("Xor", s.op("Less", a, zero), s.op("Less", b, zero))


def _floor_division(s: Scope, a: ir.Value, b: ir.Value, dtype: torch.dtype, name: str) -> ir.Value:
    """Quotient rounded down; floats by way of the remainder, as torch does (c10/util/generic_math.h, div_floor)."""
    if not dtype.is_floating_point:
        return s.op("Div", s.op("Sub", a, s.op("Mod", a, b)), b, name=name)
    zero, one = s.value(0, dtype), s.value(1, dtype)
    rest = s.op("Mod", a, b, fmod=1)
    quotient = s.op("Div", s.op("Sub", a, rest), b)
    below = s.op("And", s.op("Not", s.op("Equal", rest, zero)), _signs_differ(s, rest, b, dtype))
    quotient = s.op("Where", below, s.op("Sub", quotient, one), quotient)
    down = s.op("Floor", quotient)
    short = s.op("Greater", s.op("Sub", quotient, down), s.value(0.5, dtype))
    down = s.op("Where", short, s.op("Add", down, one), down)
    return s.op("Where", s.op("Equal", b, zero), s.op("Div", a, b), down, name=name)


def _divide(s: Scope, node: fx.Node, mode: Any) -> ir.Value:
    a, b, work = _operands(s, node)
    if mode == "floor":
        result = _floor_division(s, a, b, work, node.name)
    elif mode == "trunc" and work.is_floating_point:
        result = _truncated(s, s.op("Div", a, b), work, node.name)
    else:
        result = s.op("Div", a, b, name=node.name)
    return cast(s, result, work, s.dtype(node))


def _remainder(s: Scope, node: fx.Node) -> Emitted:
    """The rest with the sign of the divisor."""
    a, b, work = _operands(s, node)
    if not work.is_floating_point:
        return cast(s, s.op("Mod", a, b, name=node.name), work, s.dtype(node))
    rest = s.op("Mod", a, b, fmod=1)
    wrong = s.op("And", s.op("Not", s.op("Equal", rest, s.value(0, work))), _signs_differ(s, rest, b, work))
    return s.op("Where", wrong, s.op("Add", rest, b), rest, name=node.name)


def _fmod(s: Scope, node: fx.Node) -> Emitted:
    a, b, work = _operands(s, node)
    return cast(s, s.op("Mod", a, b, fmod=1, name=node.name), work, s.dtype(node))


def clipped(s: Scope, node: fx.Node, low: Any, high: Any) -> ir.Value:
    """The input between two ends, None for no end; numbers in one Clip. With the ends crossed `high` wins."""
    dtype = s.dtype(node)
    work = wide(dtype)
    x = s.value(node.args[0], work)
    if not (s.is_tensor(low) or s.is_tensor(high)):
        if work.is_floating_point:  # Clip without an end would take the largest finite number
            low, high = -math.inf if low is None else low, math.inf if high is None else high
        ends = (None if end is None else s.value(end, work) for end in (low, high))
        return cast(s, s.op("Clip", x, *ends, name=node.name), work, dtype)
    x = x if low is None else s.op("Max", x, s.value(low, work), name=node.name)
    x = x if high is None else s.op("Min", x, s.value(high, work), name=node.name)
    return cast(s, x, work, dtype)


def _clamp(s: Scope, node: fx.Node) -> Emitted:
    return clipped(s, node, argument(node, 1, "min"), argument(node, 2, "max"))


def _add_scaled(op_type: str) -> Emitter:
    """``self + value * tensor1 (* or /) tensor2``, in that order."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        dtype, value = s.dtype(node), argument(node, 3, "value", 1)
        work = wide(dtype)
        start, a, b = (s.value(x, work) for x in node.args[:3])
        if value != 1:
            a = s.op("Mul", s.value(value, work), a)
        return cast(s, s.op("Add", start, s.op(op_type, a, b), name=node.name), work, dtype)

    return emit


def _lerp(s: Scope, node: fx.Node) -> Emitted:
    """From the nearer end, as torch does: ``a + w (b - a)`` below one half, ``b - (b - a)(1 - w)`` from there."""
    dtype = s.dtype(node)
    a, b, weight = (s.value(x, dtype) for x in node.args[:3])
    gap = s.op("Sub", b, a)

    def from_a() -> ir.Value:
        return s.op("Add", a, s.op("Mul", weight, gap), name=node.name)

    def from_b() -> ir.Value:
        return s.op("Sub", b, s.op("Mul", gap, s.op("Sub", s.value(1, dtype), weight)), name=node.name)

    if not s.is_tensor(node.args[2]):
        return from_a() if abs(s.plain(node.args[2])) < 0.5 else from_b()
    near = s.op("Less", s.op("Abs", weight), s.value(0.5, dtype))
    return s.op("Where", near, from_a(), from_b())


def _overloads(name: str, emitter: Emitter, overloads: Any = ("Tensor", "Scalar")) -> dict[str, Emitter]:
    return {f"aten.{name}.{overload}": emitter for overload in overloads}


TABLE: dict[str, Emitter] = {
    **_overloads("add", weighted("Add")),
    **_overloads("sub", weighted("Sub")),
    **_overloads("rsub", weighted("Sub", swapped=True)),
    **_overloads("mul", binary("Mul", on_bool="And")),
    **_overloads("div", binary("Div")),
    "aten.div.Tensor_mode": lambda s, node: _divide(s, node, node.kwargs.get("rounding_mode")),
    "aten.floor_divide.default": lambda s, node: _divide(s, node, "floor"),
    **_overloads("remainder", _remainder),
    "aten.fmod.Scalar": _fmod,
    "aten.maximum.default": binary("Max", on_bool="Or"),
    "aten.minimum.default": binary("Min", on_bool="And"),
    **_overloads("clamp", _clamp, ("default", "Tensor")),
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": lambda s, node: clipped(s, node, None, argument(node, 1, "max")),
    "aten.addcmul.default": _add_scaled("Mul"),
    "aten.addcdiv.default": _add_scaled("Div"),
    **_overloads("lerp", _lerp),
}
