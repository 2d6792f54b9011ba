# mypy: ignore-errors
# ruff: noqa: E741
"""What follows the accumulators: affine, sums, activation, requantization, statistics, stores. All in float32."""

import triton
import triton.language as tl

#: 1.5 * 2^23: adding it rounds half to even for |v| < 2^22, and the low bits of the sum are the integer.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def affine(acc, multiplier_ptr, bias_ptr, rows, BITS: tl.constexpr):
    """``float(acc) * multiplier + bias`` of an int32 [BLOCK_M, BLOCK_N]; 4-bit accumulators count 16-fold."""
    multiplier = tl.load(multiplier_ptr + rows)
    if BITS == 4:
        multiplier = multiplier * 0.0625  # exact
    return acc.to(tl.float32) * multiplier[:, None] + tl.load(bias_ptr + rows)[:, None]


@triton.jit
def combine(
    acc, gate, acc2, gate2, multiplier_ptr, bias_ptr, multiplier2_ptr, bias2_ptr, rows, GATE: tl.constexpr,
    BITS: tl.constexpr, BITS2: tl.constexpr, SEGMENTS: tl.constexpr, GLU: tl.constexpr,
):  # fmt: skip
    """Accumulators of all segments to the float32 value and, GATE rows further on, the gate of a GLU."""
    value = affine(acc, multiplier_ptr, bias_ptr, rows, BITS)
    if SEGMENTS == 2:
        value = value + affine(acc2, multiplier2_ptr, bias2_ptr, rows, BITS2)
    gate_value = value
    if GLU:
        gate_value = affine(gate, multiplier_ptr, bias_ptr, rows + GATE, BITS)
        if SEGMENTS == 2:
            gate_value = gate_value + affine(gate2, multiplier2_ptr, bias2_ptr, rows + GATE, BITS2)
    return value, gate_value


@triton.jit
def divide(a, b, EXACT: tl.constexpr):
    """IEEE or fast division."""
    if EXACT:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def gelu_erf(x):
    """``x/2 (1 + erf(x / sqrt 2))``."""
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """0 none, 1 SiLU, 2 GELU (erf), 3 GELU (tanh), 4 ReLU."""
    if ACT == 1:
        x = divide(x, 1.0 + tl.exp(-x), EXACT)
    elif ACT == 2:
        x = gelu_erf(x)
    elif ACT == 3:  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        x = divide(x, 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)), EXACT)
    elif ACT == 4:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def requantize(x, post_ptr, QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr):
    """int8 codes ``clamp(rint(x / scale) + zero, QMIN, QMAX)``; post is (scale, zero, 1 / scale).

    Bounds and zero point are integers, so clamping may come before rounding: what is left then is the low byte of the
    float that `ROUND` makes, and no conversion is needed. The zero point is added after rounding: ties go to even steps.
    """
    zero = tl.load(post_ptr + 1)
    x = tl.div_rn(x, tl.load(post_ptr) + tl.zeros_like(x)) if EXACT else x * tl.load(post_ptr + 2)
    x = tl.minimum(tl.maximum(x, QMIN - zero), QMAX - zero)
    return ((x + ROUND).to(tl.int32, bitcast=True) + zero.to(tl.int32)).to(tl.int8)


@triton.jit
def add_row(
    value, row_ptr, rows, pixel, tile_n, mask, O: tl.constexpr, ROW_STRIDE: tl.constexpr, PER_IMAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the image's row of O floating point values to each of its pixels."""
    if PER_IMAGE % BLOCK_N == 0:  # one image per tile: a vector instead of a gather
        image = (tile_n // (PER_IMAGE // BLOCK_N)).to(tl.int64)
        row = tl.load(row_ptr + image * ROW_STRIDE + rows, mask=rows < O)
        value += row[:, None]
    else:
        image = (pixel // PER_IMAGE).to(tl.int64)
        value += tl.load(row_ptr + image[None, :] * ROW_STRIDE + rows[:, None], mask=mask)
    return value


@triton.jit
def store_stats(
    value, stats_ptr, rows, tile_n, O: tl.constexpr, PER_IMAGE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over this pixel tile, into float32 [B, T, 2, O]."""
    tl.static_assert(PER_IMAGE % BLOCK_N == 0, "statistics need whole tiles")
    mean = tl.sum(value, axis=1) * (1.0 / BLOCK_N)
    deviation = value - mean[:, None]
    slots = stats_ptr + tile_n.to(tl.int64) * (2 * O) + rows
    tl.store(slots, mean, mask=rows < O)
    tl.store(slots + O, tl.sum(deviation * deviation, axis=1), mask=rows < O)


@triton.jit
def finish(
    value,
    gate,
    rows,
    pixel,
    tile_n,
    pixels,
    row_ptr,
    residual_ptr,
    post_ptr,
    out_ptr,
    out_q_ptr,
    stats_ptr,
    PER_IMAGE: tl.constexpr,
    O: tl.constexpr,
    ROW: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RES_STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,
    OUT: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    OUT_NCHW: tl.constexpr,
    OUT_Q: tl.constexpr,
    OUT_Q_STRIDE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    STATS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row, residual, activation or GLU, then every output.

    Args:
        value, gate: float32 [BLOCK_M, BLOCK_N].
        rows: int32 [BLOCK_M], output channels; those from O on are not stored.
        pixel: int32 [BLOCK_N]; those from `pixels` on are not stored.
    """
    mask = (rows < O)[:, None] & (pixel < pixels)[None, :]
    wide = pixel.to(tl.int64)[None, :]
    if ROW:
        value = add_row(value, row_ptr, rows, pixel, tile_n, mask, O, ROW_STRIDE, PER_IMAGE, BLOCK_N)
    if RESIDUAL:
        value += tl.load(residual_ptr + wide * RES_STRIDE + rows[:, None], mask=mask).to(tl.float32)
    value = value * gelu_erf(gate) if GLU else activate(value, ACT, EXACT)
    if OUT:
        if OUT_NCHW:
            image, position = wide // PER_IMAGE, wide % PER_IMAGE
            targets = out_ptr + image * (O * PER_IMAGE) + position + rows[:, None] * PER_IMAGE
        else:
            targets = out_ptr + wide * OUT_STRIDE + rows[:, None]
        tl.store(targets, value.to(out_ptr.dtype.element_ty), mask=mask)
    if OUT_Q:
        codes = requantize(value, post_ptr, QMIN, QMAX, EXACT)
        tl.store(out_q_ptr + wide * OUT_Q_STRIDE + rows[:, None], codes, mask=mask)
    if STATS:
        store_stats(value, stats_ptr, rows, tile_n, O, PER_IMAGE, BLOCK_N)
