# mypy: ignore-errors
"""GroupNorm, activation and quantization of one tensor or of the concatenation of two.

Statistics are (mean, M2 = sum of squared deviations). Parts are merged channel by channel with the update of Chan (of
Welford, for single pixels), then over rows, then over the channels of a group; never as differences of large sums.
"""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.overlap import begin
from edadm_compile.kernels.triton.rounding import activate, inverse_root, silu_of_half, to_codes


@triton.jit
def _merge(mean, m2, mean_new, m2_new, valid, step, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """Chan's update of the moments of `step` parts by one more; each part has COUNT values."""
    if MASKED:
        mean_new = tl.where(valid, mean_new, mean)  # M2 of what is not there is loaded as 0
    delta = mean_new - mean
    mean += delta * (1.0 / (step + 1.0))
    return mean, m2 + m2_new + COUNT * delta * (mean_new - mean)


@triton.jit
def _over_rows(mean, m2, row, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, COUNT: tl.constexpr):
    """Moments [channels] from moments [BLOCK_R, channels]; row r holds parts r, r + BLOCK_R, ... below PARTS."""
    weight = ((PARTS + (BLOCK_R - 1) - row) // BLOCK_R).to(tl.float32)  # [BLOCK_R, 1]
    centre = tl.sum(mean * weight, axis=0) / PARTS  # [channels]
    delta = mean - centre[None, :]
    return centre, tl.sum(m2 + (COUNT * weight) * (delta * delta), axis=0)


@triton.jit
def _over_channels(mean, m2, channel, group, CG: tl.constexpr, HW: tl.constexpr, EPS: tl.constexpr,
                   EXACT: tl.constexpr):  # fmt: skip
    """Mean and 1 / sqrt(variance + EPS) [groups] from moments [channels]; sums through the membership matrix."""
    member = (channel // CG)[:, None] == group[None, :]  # [channels, groups]
    centre = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0) / CG  # [groups]
    delta = mean[:, None] - centre[None, :]
    m2 = tl.sum(tl.where(member, m2[:, None] + HW * (delta * delta), 0.0), axis=0)
    return centre, inverse_root(m2 / (HW * CG) + EPS, EXACT)


@triton.jit
def _affine(mean, rstd, channel, valid, group, weight_ptr, bias_ptr, CG: tl.constexpr):
    """Factor and addend [channels] of the normalisation from mean and rstd [groups]."""
    member = (channel // CG)[:, None] == group[None, :]  # [channels, groups]
    mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1)
    rstd = tl.sum(tl.where(member, rstd[None, :], 0.0), axis=1)
    factor = rstd * tl.load(weight_ptr + channel, mask=valid, other=0.0)
    return factor, tl.load(bias_ptr + channel, mask=valid, other=0.0) - mean * factor


@triton.jit
def _given_moments(stats_ptr, channel, wanted, C: tl.constexpr, T: tl.constexpr, BLOCK_T: tl.constexpr,
                   COUNT: tl.constexpr):  # fmt: skip
    """Moments [channels] of one source from its partials [T, 2, C]; channels that are not its own give 0."""
    row = tl.arange(0, BLOCK_T)[:, None]
    inside = (wanted & (channel >= 0) & (channel < C))[None, :]
    source = stats_ptr + row * (2 * C) + channel[None, :]  # [BLOCK_T, channels]
    mean = tl.load(source, mask=(row < T) & inside, other=0.0)
    m2 = tl.load(source + C, mask=(row < T) & inside, other=0.0)
    for step in range(1, (T + BLOCK_T - 1) // BLOCK_T):
        valid = (row < T - step * BLOCK_T) & inside
        mean_new = tl.load(source + step * (2 * C * BLOCK_T), mask=valid, other=0.0)
        m2_new = tl.load(source + step * (2 * C * BLOCK_T) + C, mask=valid, other=0.0)
        mean, m2 = _merge(mean, m2, mean_new, m2_new, valid, step, COUNT, T % BLOCK_T != 0)
    return _over_rows(mean, m2, row, T, BLOCK_T, COUNT)


@triton.jit
def _load(source, source2, leading, mask, STRADDLE: tl.constexpr):
    """One tile; with STRADDLE the channels that are not `leading` come from the second source."""
    if STRADDLE:  # a select of pointers would lose the 16-byte loads
        x = tl.load(source, mask=mask & leading, other=0.0)
        return tl.where(leading, x, tl.load(source2, mask=mask & (leading == 0), other=0.0))
    return tl.load(source, mask=mask, other=0.0)


@triton.jit
def _own_moments(
    x, source, source2, leading, mask, pixel, stride,
    HW: tl.constexpr, X2_STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, STRADDLE: tl.constexpr,
):  # fmt: skip
    """Moments [channels] of all pixels; `x` holds the first BLOCK_P of them."""
    mean = x.to(tl.float32)  # [BLOCK_P, BLOCK_C]
    m2 = tl.zeros_like(mean)
    for step in range(1, (HW + BLOCK_P - 1) // BLOCK_P):
        jump = step * BLOCK_P
        valid = pixel < HW - jump
        new = _load(source + jump * stride, source2 + jump * X2_STRIDE, leading, valid & mask, STRADDLE)
        mean, m2 = _merge(mean, m2, new.to(tl.float32), 0.0, valid, step, 1.0, HW % BLOCK_P != 0)
    return _over_rows(mean, m2, pixel, HW, BLOCK_P, 1.0)


@triton.jit
def _write_moments(
    x_ptr, stats_ptr, image, HW: tl.constexpr, C: tl.constexpr, X_STRIDE: tl.constexpr, T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Moments of BLOCK_C channels over the HW / T pixels of one part."""
    pixel, part = tl.arange(0, BLOCK_P)[:, None], tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (channel < C)[None, :]
    source = x_ptr + image * (HW * X_STRIDE) + part * (HW // T * X_STRIDE) + channel[None, :] + pixel * X_STRIDE
    x = _load(source, source, True, (pixel < HW // T) & mask, False)
    mean, m2 = _own_moments(x, source, source, True, mask, pixel, X_STRIDE, HW // T, 0, BLOCK_P, False)
    stats_ptr += image * (T * 2 * C) + part * (2 * C)
    tl.store(stats_ptr + channel, mean, mask=channel < C)
    tl.store(stats_ptr + C + channel, m2, mask=channel < C)


@triton.jit
def _write(
    x, factor, addend, out, out_q, mask, post,
    ACT: tl.constexpr, OUT: tl.constexpr, OUT_Q: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Normalise one tile [BLOCK_P, BLOCK_C], apply the activation, store values and codes at the given pointers.

    For the SiLU made from tanh.approx, `factor` and `addend` are halved already.
    """
    v = x.to(tl.float32) * factor[None, :] + addend[None, :]
    v = silu_of_half(v) if ACT == 1 and ASM and not EXACT else activate(v, ACT, EXACT, ASM)
    if OUT:
        tl.store(out, v.to(out.dtype.element_ty), mask=mask)
    if OUT_Q:
        scale, zero, inverse = post
        tl.store(out_q, to_codes(v, scale, zero, inverse, QMIN, QMAX, EXACT, ASM), mask=mask)


@triton.jit
def _normalise(
    x_ptr, x2_ptr, stats_ptr, stats2_ptr, weight_ptr, bias_ptr, post_ptr, out_ptr, out_q_ptr, image,
    HW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, X_STRIDE: tl.constexpr, X2_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr,
    OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    T: tl.constexpr, T2: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Statistics, then all tiles of one program.

    T = 0: one program for all pixels of BLOCK_G whole groups; the channels may lie in both sources.
    T > 0: STEPS blocks of pixels of BLOCK_C channels of one source, which may begin and end inside a group.
    """
    CG: tl.constexpr = (C + C2) // GROUPS
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C  # of the first source, T > 0
    PARTS: tl.constexpr = STEPS if T > 0 else (HW + BLOCK_P - 1) // BLOCK_P
    STRADDLE: tl.constexpr = T == 0 and C2 > 0 and C % (BLOCK_G * CG) != 0  # a program may need both sources
    block, lane = tl.program_id(1), tl.arange(0, BLOCK_C)
    pixel = tl.program_id(0) * (BLOCK_P * PARTS) + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
    if T > 0:
        leading = block < BLOCKS  # in the first source
        first = tl.where(leading, block * BLOCK_C, C + (block - BLOCKS) * BLOCK_C)
        channel = first + lane
        valid = channel < tl.where(leading, C, C + C2)
    else:
        first = block * (BLOCK_G * CG)
        leading = first < C
        channel = first + lane
        valid = (lane < BLOCK_G * CG) & (channel < C + C2)

    # the first tile is in flight while the statistics are computed
    x_ptr += image * (HW * X_STRIDE)
    stride, start, source2 = X_STRIDE, 0, x_ptr
    if STRADDLE:
        source2 = x2_ptr + image * (HW * X2_STRIDE) + (channel - C)[None, :] + pixel * X2_STRIDE
        leading = (channel < C)[None, :]
    elif C2 > 0:
        x_ptr = tl.where(leading, x_ptr, x2_ptr + image * (HW * X2_STRIDE))
        stride, start = tl.where(leading, X_STRIDE, X2_STRIDE), tl.where(leading, 0, C)
    source = x_ptr + (channel - start)[None, :] + pixel * stride  # [BLOCK_P, BLOCK_C]
    x = _load(source, source2, leading, (pixel < HW) & valid[None, :], STRADDLE)

    group = first // CG + tl.arange(0, triton.next_power_of_2(BLOCK_G))
    if T > 0:
        BLOCK_W: tl.constexpr = triton.next_power_of_2(BLOCK_G * CG)
        BLOCK_T: tl.constexpr = max(1, min(triton.next_power_of_2(max(T, T2)), 2048 // BLOCK_W))
        wide = (first // CG) * CG + tl.arange(0, BLOCK_W)  # channels of the groups the block touches
        wanted = (tl.arange(0, BLOCK_W) < BLOCK_G * CG) & (wide < C + C2)
        mean, m2 = _given_moments(stats_ptr + image * (T * 2 * C), wide, wanted, C, T, BLOCK_T, HW // T)
        if C2 > 0:
            stats2_ptr += image * (T2 * 2 * C2)
            mean2, m22 = _given_moments(stats2_ptr, wide - C, wanted, C2, T2, BLOCK_T, HW // T2)
            mean, m2 = mean + mean2, m2 + m22  # a channel has one source, the other one gives 0
        centre, rstd = _over_channels(mean, m2, wide, group, CG, HW, EPS, EXACT)
    else:
        mean, m2 = _own_moments(
            x, source, source2, leading, valid[None, :], pixel, stride, HW, X2_STRIDE, BLOCK_P, STRADDLE
        )
        centre, rstd = _over_channels(mean, m2, channel, group, CG, HW, EPS, EXACT)
    factor, addend = _affine(centre, rstd, channel, valid, group, weight_ptr, bias_ptr, CG)
    if ACT == 1 and ASM and not EXACT:
        factor, addend = 0.5 * factor, 0.5 * addend

    post = (1.0, 0.0, 1.0)
    out, out_q = source, source  # replaced by whatever is written
    if OUT:
        out = out_ptr + image * (HW * OUT_STRIDE) + channel[None, :] + pixel * OUT_STRIDE
    if OUT_Q:
        post = (tl.load(post_ptr), tl.load(post_ptr + 1), tl.load(post_ptr + 2))
        out_q = out_q_ptr + image * (HW * OUT_Q_STRIDE) + channel[None, :] + pixel * OUT_Q_STRIDE
    for step in range(PARTS):
        mask = (pixel < HW - step * BLOCK_P) & valid[None, :]
        ahead = (pixel < HW - (step + 1) * BLOCK_P) & valid[None, :] & (step + 1 < PARTS)
        jump = (step + 1) * BLOCK_P
        following = _load(source + jump * stride, source2 + jump * X2_STRIDE, leading, ahead, STRADDLE)
        _write(x, factor, addend, out + step * BLOCK_P * OUT_STRIDE, out_q + step * BLOCK_P * OUT_Q_STRIDE, mask, post,
               ACT, OUT, OUT_Q, QMIN, QMAX, EXACT, ASM)  # fmt: skip
        x = following


@triton.jit
def groupnorm(
    x_ptr, x2_ptr, stats_ptr, stats2_ptr, weight_ptr, bias_ptr, post_ptr, out_ptr, out_q_ptr,
    batch,
    HW: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, X_STRIDE: tl.constexpr, X2_STRIDE: tl.constexpr,
    GROUPS: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr,
    OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    T: tl.constexpr, T2: tl.constexpr, MOMENTS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """See `edadm_compile.kernels.groupnorm`; grid (pixel blocks, channel blocks, images)."""
    begin(OVERLAP)
    image = tl.program_id(2).to(tl.int64)
    if MOMENTS:
        _write_moments(x_ptr, stats_ptr, image, HW, C, X_STRIDE, T, BLOCK_P, BLOCK_C)
    else:
        _normalise(
            x_ptr, x2_ptr, stats_ptr, stats2_ptr, weight_ptr, bias_ptr, post_ptr, out_ptr, out_q_ptr, image,
            HW, C, C2, X_STRIDE, X2_STRIDE, GROUPS, EPS, ACT, OUT, OUT_STRIDE, OUT_Q, OUT_Q_STRIDE, QMIN, QMAX,
            T, T2, EXACT, ASM, BLOCK_P, BLOCK_C, BLOCK_G, STEPS,
        )  # fmt: skip
