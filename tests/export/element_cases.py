"""Cases of elementwise operators.

Tolerances: ONNX Runtime and torch both compute these within 1 or 2 ulps of the exact value of each step, so 4 ulps cover
one step of both, and more are given where several steps follow each other. `largest` is named where a step has a bigger
value than the result (a sum that cancels, the 1 in ``exp(x) - 1``).
"""

from __future__ import annotations

import math

import torch

from tests.export.cases import Case, case
from tests.export.onnx_graphs import Constant, Given, Size, between, exactly, normal, whole

INF, NAN = math.inf, math.nan
X, Y, ROW = normal(3, 4), normal(3, 4), normal(4, batched=False)
HALVES = exactly([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.0, 7.0])
SPECIAL = exactly([-INF, -1.0, 0.0, 1.0, INF, NAN])
WHOLE, COUNTS, POSITIVE = whole(-9, 10, 3, 4), whole(1, 5, 3, 4), between(0.1, 4, 3, 4)
BYTES, SHORT = whole(-100, 101, 3, 4, dtype=torch.int8), whole(-9, 10, 3, 4, dtype=torch.int32)
BITS, OTHER_BITS = whole(0, 2, 3, 4, dtype=torch.bool), whole(0, 2, 3, 4, dtype=torch.bool)
NUMBER = Constant(torch.tensor(2.5))
F64 = torch.float64


def _signed(*names: str) -> list[Case]:
    return [
        case(f"{n}.default", words, v)
        for n in names
        for words, v in (("floats", X), ("integers", WHOLE), ("bytes", BYTES))
    ]


def _of_float(*names: str, of: Given = X, ulps: float = 4, largest: float = 0) -> list[Case]:
    """Float functions, which take integers as floats."""
    steps = whole(1, 4, 3, 4)
    return [case(f"{n}.default", "floats", of, ulps=ulps, largest=largest) for n in names] + [
        case(f"{n}.default", "integers become floats", steps, ulps=ulps, largest=largest) for n in names
    ]


def _compared(*names: str) -> list[Case]:
    return [
        c
        for n in names
        for c in (
            case(f"{n}.Tensor", "floats", exactly([1.0, 2.0, NAN]), exactly([2.0, 2.0, NAN])),
            case(f"{n}.Tensor", "integers with floats", WHOLE, normal(3, 4)),
            case(f"{n}.Tensor", "bytes", BYTES, whole(-100, 101, 3, 4, dtype=torch.int8)),
            case(f"{n}.Scalar", "integers with a fraction", whole(1, 4, 5), 2.5),
            case(f"{n}.Scalar", "a number that float32 rounds", exactly([0.1, 0.2, 0.3]), 0.1),
            case(f"{n}.Tensor", "truth values", BITS, OTHER_BITS),
        )
    ]


UNARY = (
    _signed("neg", "abs", "sign")
    + [case("sign.default", "truth values", BITS)]
    + _of_float("exp", "sin", "cos", "tanh", "sigmoid", "erf", "reciprocal")
    + _of_float("tan", largest=30)  # near the poles the error of x counts x^2 times
    + _of_float("log", "log2", "sqrt", "rsqrt", "log1p", of=POSITIVE, ulps=8)
    + _of_float("exp2", "expm1", ulps=8)
    + [
        case("expm1.default", "small numbers keep their digits", between(-1e-6, 1e-6, 50)),
        case("expm1.default", "special values", exactly([-INF, -100.0, 0.0, 100.0, INF, NAN])),
        case("log1p.default", "small numbers keep their digits", between(-1e-6, 1e-6, 50)),
        case("log1p.default", "special values", exactly([-1.0, 0.0, 1e30, INF, NAN, -2.0])),
        case("log2.default", "powers of two", exactly([2.0**k for k in range(-20, 21)]), ulps=0),
        case("square.default", "floats", X),
        case("square.default", "bytes wrap", BYTES),
        case("relu.default", "floats", X),
        case("relu.default", "integers", WHOLE),
        case("isnan.default", "floats", SPECIAL),
        case("isnan.default", "integers", WHOLE),
        case("nan_to_num.default", "defaults", SPECIAL),
        case("nan_to_num.default", "given values", SPECIAL, 2.0, 3.0, -4.0),
        case("nan_to_num.default", "integers", WHOLE),
        case("logical_not.default", "floats", HALVES),
        case("logical_not.default", "truth values", BITS),
        case("bitwise_not.default", "truth values", BITS),
        case("bitwise_not.default", "bytes", BYTES),
    ]
    + [
        case(f"{n}.default", w, v)
        for n in ("floor", "ceil", "round")
        for w, v in (("halves", HALVES), ("integers", WHOLE))
    ]
)

TYPES = [
    case("_to_copy.default", "floats to integers", HALVES, dtype=torch.int64),
    case("_to_copy.default", "nothing to do", X),
    case("to.dtype", "integers to floats", WHOLE, torch.float32),
    case("to.dtype", "floats to truth values", HALVES, torch.bool),
    case("to.dtype", "half precision", X, torch.float16, ulps=0),
    case("to.dtype_layout", "floats to float64", X, dtype=F64),
    case("to.device", "truth values to floats", BITS, torch.device("cpu"), torch.float32),
    case("type_as.default", "integers as floats", WHOLE, normal(2)),
]

BINARY = (
    [
        c
        for n in ("add", "sub", "mul")
        for c in (
            case(f"{n}.Tensor", "floats, broadcast", X, ROW, largest=6),
            case(f"{n}.Tensor", "integers with floats", WHOLE, Y, largest=12),
            case(f"{n}.Tensor", "a number that is a tensor does not promote", SHORT, Constant(torch.tensor(3))),
            case(f"{n}.Tensor", "a number instead of a tensor", X, 0.1, largest=6),
            case(f"{n}.Tensor", "bytes wrap", BYTES, whole(-100, 101, 3, 4, dtype=torch.int8)),
            case(f"{n}.Tensor", "the batch size as the number", X, Size(), largest=6),
            case(f"{n}.Scalar", "integers with a fraction", WHOLE, 0.5, largest=12),
        )
    ]
    + [
        case("add.Tensor", "truth values with integers", BITS, WHOLE),
        case("mul.Tensor", "truth values with integers", BITS, WHOLE),
        case("add.Tensor", "alpha", X, Y, alpha=0.3, largest=6),
        case("add.Tensor", "alpha, integers", WHOLE, COUNTS, alpha=3),
        case("add.Tensor", "truth values", BITS, OTHER_BITS),
        case("add.Scalar", "alpha", X, 2, 3, largest=9),
        case("sub.Tensor", "alpha", X, Y, alpha=0.3, largest=6),
        case("sub.Scalar", "alpha", X, 2, 0.5, largest=6),
        case("rsub.Tensor", "alpha", X, Y, alpha=0.3, largest=6),
        case("rsub.Scalar", "floats", X, 1, largest=6),
        case("rsub.Scalar", "alpha, integers", WHOLE, 1, 4),
        case("mul.Tensor", "truth values", BITS, OTHER_BITS),
        case("div.Tensor", "floats", X, POSITIVE),
        case("div.Tensor", "integers become floats", WHOLE, COUNTS),
        case("div.Scalar", "integers become floats", WHOLE, 3),
        case("div.Tensor_mode", "rounded down, integers", WHOLE, COUNTS, rounding_mode="floor"),
        case("div.Tensor_mode", "rounded down, integers by a negative number", WHOLE, -4, rounding_mode="floor"),
        case("div.Tensor_mode", "rounded down, floats", X, Y, rounding_mode="floor", ulps=0),
        case("div.Tensor_mode", "rounded down, where the quotient rounds up", exactly([1.0, 0.7]), 0.1,
             rounding_mode="floor", ulps=0),
        case("div.Tensor_mode", "rounded down, by zero", exactly([1.0, -1.0, 0.0]), 0.0, rounding_mode="floor"),
        case("div.Tensor_mode", "cut off, integers", WHOLE, COUNTS, rounding_mode="trunc"),
        case("div.Tensor_mode", "cut off, floats", X, Y, rounding_mode="trunc", ulps=0),
        case("div.Tensor_mode", "not rounded", WHOLE, COUNTS, rounding_mode=None),
        case("floor_divide.default", "integers", WHOLE, COUNTS),
        case("floor_divide.default", "floats", X, POSITIVE, ulps=0),
        case("remainder.Scalar", "integers", WHOLE, 4),
        case("remainder.Scalar", "floats by a negative number", X, -0.7, largest=3),
        case("remainder.Tensor", "integers of both signs", WHOLE, whole(-5, 0, 3, 4)),
        case("remainder.Tensor", "floats", X, Y, largest=3),
        case("remainder.Tensor", "bytes", BYTES, whole(1, 9, 3, 4, dtype=torch.int8)),
        case("fmod.Scalar", "integers", WHOLE, 4),
        case("fmod.Scalar", "floats", X, 0.7, ulps=0),
    ]
)  # fmt: skip

POWERS = [
    *(case("pow.Tensor_Scalar", f"exponent {e}", POSITIVE, e, ulps=16) for e in (2, 3, 0.5, -0.5, -1, -2, 1, 0, 2.5, -3)),
    case("pow.Tensor_Scalar", "negative bases", X, 3),
    case("pow.Tensor_Scalar", "integers", WHOLE, 7),
    case("pow.Tensor_Scalar", "integers, exponent 0", WHOLE, 0),
    case("pow.Tensor_Scalar", "integers, exponent a fraction", COUNTS, 0.5),
    case("pow.Tensor_Scalar", "bytes wrap", BYTES, 3),
    case("pow.Scalar", "floats", 2.5, X, ulps=16),
    case("pow.Scalar", "base of a timestep embedding", 10000.0, between(-1, 0, 8), ulps=32),  # log(10^4) ulps of y
    case("pow.Tensor_Tensor", "floats", POSITIVE, X, ulps=16),
    case("pow.Tensor_Tensor", "integers with floats", COUNTS, X, ulps=16),
    case("float_power.Tensor_Scalar", "float64", POSITIVE, 1.5),
    case("atan2.default", "all quadrants", X, Y, ulps=8),
    case("atan2.default", "axes and zeros", exactly([0.0, 0.0, -0.0, -0.0, 1.0, -1.0, INF, -INF, 0.0, 2.0]),
         exactly([1.0, -1.0, 1.0, -1.0, 0.0, -0.0, INF, -INF, -0.0, -INF])),
    case("hypot.default", "no overflow", exactly([3.0, 3e30, 1e-30, 0.0]), exactly([4.0, 4e30, 1e-30, 0.0])),
]  # fmt: skip

CHOICES = [
    case("maximum.default", "floats, with NaN", exactly([1.0, NAN, 2.0, INF]), exactly([2.0, 1.0, NAN, 3.0])),
    case("maximum.default", "integers with floats", WHOLE, X),
    case("maximum.default", "truth values", BITS, OTHER_BITS),
    case("minimum.default", "floats, with NaN", exactly([1.0, NAN, 2.0, INF]), exactly([2.0, 1.0, NAN, 3.0])),
    case("minimum.default", "bytes", BYTES, whole(-100, 101, 3, 4, dtype=torch.int8)),
    case("minimum.default", "truth values", BITS, OTHER_BITS),
    case("clamp.default", "both ends", X, -0.5, 0.5),
    case("clamp.default", "low end, with NaN", SPECIAL, -0.5),
    case("clamp.default", "both ends, with NaN among many", exactly([-INF, -1.0, NAN, 1.0, INF] * 9), -0.5, 0.5),
    case("clamp.default", "high end", X, None, 0.5),
    case("clamp.default", "ends crossed", X, 1.0, -1.0),
    case("clamp.default", "integers", WHOLE, -2, 3),
    case("clamp.default", "integers with a fraction", WHOLE, -2.5, 3),
    case("clamp.default", "bytes", BYTES, -2, 3),
    case("clamp.Tensor", "both ends", X, normal(4, batched=False), Constant(torch.tensor(1.0))),
    case("clamp.Tensor", "high end", X, None, Y),
    case("clamp_min.default", "floats", X, 0.2),
    *[case("clamp_max.default", w, v, 2) for w, v in (("floats", X), ("integers", WHOLE))],
    case("where.self", "broadcast", BITS, X, ROW),
    case("where.self", "integers with floats", BITS, WHOLE, Y),
    case("where.self", "truth values", BITS, OTHER_BITS, whole(0, 2, 3, 4, dtype=torch.bool)),
    case("where.ScalarOther", "floats", BITS, X, -INF),
    case("where.ScalarSelf", "integers", BITS, 3, WHOLE),
    *[case("where.Scalar", w, BITS, a, 2) for w, a in (("floats", 1.5), ("integers", 1))],
    case("masked_fill.Scalar", "floats", X, BITS, -INF),
    case("masked_fill.Scalar", "mask of one row", X, whole(0, 2, 4, dtype=torch.bool, batched=False), 2),
    case("masked_fill.Tensor", "integers", WHOLE, BITS, Constant(torch.tensor(5))),
    *_compared("eq", "ne", "lt", "le", "gt", "ge"),
    case("logical_and.default", "floats", HALVES, exactly([0.0, 1.0] * 4)),
    case("logical_or.default", "truth values", BITS, OTHER_BITS),
    case("bitwise_and.Tensor", "truth values", BITS, OTHER_BITS),
    case("bitwise_and.Tensor", "integers", WHOLE, COUNTS),
    case("bitwise_or.Tensor", "bytes", BYTES, whole(-100, 101, 3, 4, dtype=torch.int8)),
    case("bitwise_or.Tensor", "truth values", BITS, OTHER_BITS),
]

TERNARY = [
    case("addcmul.default", "plain", X, Y, POSITIVE, largest=15),
    case("addcmul.default", "value", X, Y, POSITIVE, value=0.3, largest=6),
    case("addcmul.default", "integers", WHOLE, COUNTS, COUNTS, value=2),
    case("addcdiv.default", "value", X, Y, POSITIVE, value=0.3, largest=12),
    case("lerp.Scalar", "nearer to the start", X, Y, 0.3, largest=6),
    case("lerp.Scalar", "nearer to the end", X, Y, 0.7, largest=6),
    case("lerp.Tensor", "both", X, Y, between(0, 1, 3, 4), largest=6),
]

#: exp(x) - 1 and log(1 + exp(x)) are near 1 on the way.
ACTIVATIONS = [
    case("silu.default", "floats", X),
    case("gelu.default", "exact", X, largest=1),
    case("gelu.default", "tanh", X, approximate="tanh", largest=1),
    case("relu6.default", "floats", between(-2, 9, 20)),
    *[case("leaky_relu.default", words, X, *slope) for words, slope in (("default", ()), ("slope", (0.3,)))],
    case("elu.default", "default", X, largest=1),
    case("elu.default", "alpha", X, 0.5, largest=1),
    case("elu.default", "scales", X, 1.5, 2.0, 0.7, largest=1),
    case("selu.default", "floats", X, largest=2),
    case("celu.default", "default", X, largest=1),
    case("celu.default", "alpha", X, 2.0, largest=2),
    case("mish.default", "floats", X, largest=1, ulps=8),
    case("softplus.default", "default", between(-5, 30, 50), largest=1),
    case("softplus.default", "beta", X, 2.0, largest=1),
    case("softplus.default", "low threshold", X, 1.0, 1.0, largest=1),
    case("hardtanh.default", "default", X),
    case("hardtanh.default", "ends", X, -0.3, 2.0),
    case("hardswish.default", "floats", between(-5, 5, 40)),
    case("hardsigmoid.default", "floats", between(-5, 5, 40)),
    case("prelu.default", "slope per channel", normal(3, 2, 2), Constant(torch.tensor([0.1, 0.2, 0.3]))),
    case("prelu.default", "one slope", X, Constant(torch.tensor([0.1]))),
    case("prelu.default", "one slope, a vector", Constant(torch.tensor([-2.0, 3.0])), Constant(torch.tensor([0.1]))),
    case("log_sigmoid.default", "floats", between(-30, 30, 60), largest=1),
    case("threshold.default", "floats", X, 0.1, 20.0),
    case("glu.default", "last dimension", X),
    case("glu.default", "channels", normal(4, 3, 3), 1),
]

ELEMENT_CASES = UNARY + TYPES + BINARY + POWERS + CHOICES + TERNARY + ACTIVATIONS
