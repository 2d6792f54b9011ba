# mypy: ignore-errors
"""Elementwise device functions shared by the kernels that write codes: activations, rounding, packing.

EXACT = True uses the divisions and roots of IEEE 754; ASM = True inline assembly where it is shorter and EXACT is False.
"""

import triton
import triton.language as tl

#: 1.5 * 2^23: added to |v| < 2^22 it leaves round_half_even(v) in the low bits of the float32.
MAGIC = tl.constexpr(12582912.0)
#: Bits of `MAGIC`; the low 16 are zero, so the low bits of the sum are the code itself.
MAGIC_BITS = tl.constexpr(0x4B400000)
#: Exponents above it are not needed to saturate, and exp() of it does not overflow.
BOUND = tl.constexpr(80.0)


@triton.jit
def inverse_root(v, EXACT: tl.constexpr):
    """float32 1 / sqrt(v)."""
    if EXACT:
        return tl.div_rn(1.0, tl.sqrt_rn(v))
    return tl.rsqrt(v)


@triton.jit
def saturated_bytes(n):
    """int32 clamped to [-128, 127] as int8, four values per 32-bit word (two instructions); GPU only."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 high; cvt.pack.sat.s8.s32.b32 high, $4, $3, 0; cvt.pack.sat.s8.s32.b32 $0, $2, $1, high; }",
        "=r,r,r,r,r",
        args=[n],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def wide_codes(v, scale, zero, inverse, QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr):
    """int32 clamp(round_half_even(v / scale) + zero, QMIN, QMAX).

    The bounds are integers, so clamping before rounding gives the same code and keeps `MAGIC` in its range.
    """
    u = tl.div_rn(v, scale) if EXACT else v * inverse
    u = tl.minimum(tl.maximum(u, QMIN - zero), QMAX - zero)
    return ((u + MAGIC) + zero).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def to_codes(v, scale, zero, inverse, QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """int8 clamp(round_half_even(v / scale) + zero, QMIN, QMAX); scale, zero, inverse = 1 / scale are scalars."""
    if ASM and not EXACT and QMIN == -128 and QMAX == 127:
        # u + MAGIC <= 0 means u < -2^23: its bits would wrap around, 0 saturates to -128 as it should
        shifted = tl.maximum(v * inverse + MAGIC, 0.0).to(tl.int32, bitcast=True)
        return saturated_bytes(shifted + (zero.to(tl.int32) - MAGIC_BITS))
    return wide_codes(v, scale, zero, inverse, QMIN, QMAX, EXACT).to(tl.int8)


@triton.jit
def tanh_approx(v):
    """float32 tanh with relative error 2^-11 in one instruction; GPU only."""
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", args=[v], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def tanh(v, EXACT: tl.constexpr, ASM: tl.constexpr):
    """Hyperbolic tangent, float32: 1 - 2 / (exp(2v) + 1)."""
    if ASM and not EXACT:
        return tanh_approx(v)
    power = tl.exp(tl.minimum(2.0 * v, BOUND)) + 1.0
    if EXACT:
        return 1.0 - tl.div_rn(2.0, power)
    return 1.0 - 2.0 / power


@triton.jit
def silu_of_half(half):
    """float32 SiLU of 2 * half in two instructions: half * tanh(half) + half, error 2^-11 |half|; GPU only."""
    return half * tanh_approx(half) + half


@triton.jit
def silu(v, EXACT: tl.constexpr, ASM: tl.constexpr):
    """float32 v * sigmoid(v) = v / (1 + exp(-v))."""
    if ASM and not EXACT:
        return silu_of_half(0.5 * v)
    power = 1.0 + tl.exp(tl.minimum(-v, BOUND))
    if EXACT:
        return tl.div_rn(v, power)
    return v / power


@triton.jit
def activate(v, ACT: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):
    """float32 activation: 0 none, 1 SiLU, 2 GELU (erf), 3 GELU (tanh), 4 ReLU."""
    tl.static_assert(ACT >= 0 and ACT <= 4, "unknown activation")
    if ACT == 1:
        return silu(v, EXACT, ASM)
    if ACT == 2:
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    if ACT == 3:
        return 0.5 * v * (1.0 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v), EXACT, ASM))
    if ACT == 4:
        return tl.maximum(v, 0.0)
    return v
