"""Powers, roots, logarithms and angles."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.operands import cast, wide
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _power_of_number(s: Scope, node: fx.Node) -> Emitted:
    """Small whole exponents as products, exact for integers; 0.5 and -0.5 as roots, as torch does."""
    dtype, exponent = s.dtype(node), argument(node, 1, "exponent")
    work = wide(dtype)
    x = s.value(node.args[0], work)
    if exponent in (0.5, -0.5):
        root = s.op("Sqrt", x, name=node.name)
        return root if exponent > 0 else s.op("Reciprocal", root)
    if not work.is_floating_point or exponent in (1, 2, 3, -1, -2):
        return cast(s, _whole_power(s, x, int(exponent), work, node.name), work, dtype)
    return s.op("Pow", x, s.value(exponent, work), name=node.name)


def _whole_power(s: Scope, x: ir.Value, exponent: int, dtype: torch.dtype, name: str) -> ir.Value:
    result: ir.Value | None = None
    square, left = x, abs(exponent)
    while left:
        if left & 1:
            result = square if result is None else s.op("Mul", result, square, name=name)
        left >>= 1
        square = s.op("Mul", square, square) if left else square
    if result is None:
        result = s.op("Add", s.op("Mul", x, s.value(0, dtype)), s.value(1, dtype))
    return s.op("Reciprocal", result) if exponent < 0 else result


def _power(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    if not dtype.is_floating_point:
        raise ExportError("pow of integers with a tensor as the exponent has no exact ONNX form")
    base, exponent = (s.value(argument(node, i, n), dtype) for i, n in enumerate(("self", "exponent")))
    return s.op("Pow", base, exponent, name=node.name)


def log1p(s: Scope, x: ir.Value, dtype: torch.dtype, name: str = "") -> ir.Value:
    """``log(1 + x)`` without losing small x: with u = 1 + x rounded, ``log(u) x / (u - 1)`` (Kahan)."""
    one = s.value(1, dtype)
    u = s.op("Add", x, one)
    log = s.op("Log", u)
    exact = s.op("Mul", log, s.op("Div", x, s.op("Sub", u, one)))
    exact = s.op("Where", s.op("Equal", u, one), x, exact)
    return s.op("Where", s.op("Equal", u, x), log, exact, name=name)


def expm1(s: Scope, x: ir.Value, dtype: torch.dtype, name: str = "") -> ir.Value:
    """``exp(x) - 1`` without losing small x: with u = exp(x), ``(u - 1) x / log(u)`` (Kahan)."""
    one = s.value(1, dtype)
    u = s.op("Exp", x)
    less = s.op("Sub", u, one)
    exact = s.op("Div", s.op("Mul", less, x), s.op("Log", u))
    near = s.op("Less", s.op("Abs", x), one)
    exact = s.op("Where", s.op("Equal", u, one), x, exact)
    return s.op("Where", near, exact, less, name=name)


def of_float(function: Callable[[Scope, ir.Value, torch.dtype], ir.Value]) -> Emitter:
    """A function of one tensor, written in ONNX nodes for the type of the result."""
    return lambda s, node: function(s, s.value(node.args[0], s.dtype(node)), s.dtype(node))


def _is_negative(s: Scope, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Sign bit: also of a zero, whose reciprocal tells."""
    zero = s.value(0, dtype)
    return s.op("Less", s.op("Where", s.op("Equal", x, zero), s.op("Reciprocal", x), x), zero)


def _atan2(s: Scope, node: fx.Node) -> Emitted:
    """Arc tangent of the quotient, turned by pi where x is negative."""
    dtype = s.dtype(node)
    y, x = (s.value(a, dtype) for a in node.args[:2])
    zero = s.value(0, dtype)
    ratio = s.op("Where", s.op("Equal", y, zero), zero, s.op("Div", y, x))
    both = s.op("And", s.op("IsInf", y), s.op("IsInf", x))
    ratio = s.op("Where", both, s.op("Mul", s.op("Sign", y), s.op("Sign", x)), ratio)
    turn = s.op("Where", _is_negative(s, y, dtype), s.value(-math.pi, dtype), s.value(math.pi, dtype))
    angle = s.op("Atan", ratio)
    return s.op("Where", _is_negative(s, x, dtype), s.op("Add", angle, turn), angle, name=node.name)


def _hypot(s: Scope, node: fx.Node) -> Emitted:
    """In float64, where the squares of float32 numbers neither overflow nor vanish."""
    dtype = s.dtype(node)
    if dtype == torch.float64:
        raise ExportError("hypot of float64 has no ONNX form")
    a, b = (s.value(x, torch.float64) for x in node.args[:2])
    root = s.op("Sqrt", s.op("Add", s.op("Mul", a, a), s.op("Mul", b, b)), name=node.name)
    return cast(s, root, torch.float64, dtype)


def _exp2(s: Scope, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return s.op("Pow", s.value(2, dtype), x)


def _log2(s: Scope, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """By way of float64, so that powers of two have whole logarithms."""
    log = s.op("Log", cast(s, x, dtype, torch.float64))
    return cast(s, s.op("Mul", log, s.const(1 / math.log(2), torch.float64)), torch.float64, dtype)


def _float_power(s: Scope, node: fx.Node) -> Emitted:
    base, exponent = (s.value(a, torch.float64) for a in node.args[:2])
    return s.op("Pow", base, exponent, name=node.name)


def _square(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    x = s.value(node.args[0], wide(dtype))
    return cast(s, s.op("Mul", x, x, name=node.name), wide(dtype), dtype)


TABLE: dict[str, Emitter] = {
    "aten.pow.Tensor_Scalar": _power_of_number,
    "aten.pow.Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
    "aten.float_power.Tensor_Scalar": _float_power,
    "aten.atan2.default": _atan2,
    "aten.hypot.default": _hypot,
    "aten.square.default": _square,
    "aten.rsqrt.default": of_float(lambda s, x, dtype: s.op("Reciprocal", s.op("Sqrt", x))),
    "aten.exp2.default": of_float(_exp2),
    "aten.log2.default": of_float(_log2),
    "aten.log1p.default": of_float(log1p),
    "aten.expm1.default": of_float(expm1),
}
