# mypy: ignore-errors
"""Attention on int8 codes, flash style: the matrix of scores exists only in tiles.

|sum (q - zero_q)(k - zero_k)| <= 256 * 255^2 < 2^24 for head sizes up to 256: float32 holds every such sum exactly, also
the corrections for the zero points, so that they are added after the conversion of the int32 product.
"""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.overlap import begin
from edadm_compile.kernels.triton.rounding import to_codes

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(base, row, column, STRIDE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """int8 tile [rows, BLOCK_D] of a matrix [ROWS, D]; 0 outside."""
    source = base + row[:, None] * STRIDE + column[None, :]
    if MASKED:
        return tl.load(source, mask=(row < ROWS)[:, None] & (column < D)[None, :], other=0)
    if column.shape[0] != D:
        return tl.load(source, mask=(column < D)[None, :], other=0)
    return tl.load(source)


@triton.jit
def _values(v, zero_v, ZERO_V: tl.constexpr, ASM: tl.constexpr):
    """float16 v - zero_v of int8 v, exact (integers below 2048)."""
    if ASM:
        # the bytes of v + 128 under the exponent of 1024: 1152 + v without a conversion
        wide = tl.inline_asm_elementwise(
            "{ .reg .b32 u; xor.b32 u, $2, 0x80808080; "
            "prmt.b32 $0, u, 0x64646464, 0x4140; prmt.b32 $1, u, 0x64646464, 0x4342; }",
            "=r,=r,r",
            args=[v],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return wide - (1152.0 + zero_v).to(tl.float16)
    wide = v.to(tl.float16)
    return wide - zero_v.to(tl.float16) if ZERO_V else wide


@triton.jit
def _scores(q, k, zero_q, row_term, key, LK: tl.constexpr, ZERO_Q: tl.constexpr, MASKED: tl.constexpr):
    """float32 [BLOCK_Q, BLOCK_KV] of integers sum (q - zero_q)(k - zero_k), up to what `row_term` omits."""
    scores = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    if ZERO_Q:
        scores -= (zero_q * tl.sum(k.to(tl.int32), axis=1).to(tl.float32))[None, :]
    if row_term is not None:
        scores += row_term[:, None]
    if MASKED:
        scores = tl.where((key < LK)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _power(scores, largest, qk_scale, EXACT: tl.constexpr):
    """exp(qk_scale * (scores - largest)); with EXACT the two products are rounded before the difference, as in torch."""
    if EXACT:
        return tl.exp(scores * qk_scale - largest * qk_scale)
    factor = qk_scale * LOG2_E
    return tl.exp2(scores * factor - largest * factor)


@triton.jit
def _online(scores, largest, total, qk_scale, EXACT: tl.constexpr):
    """One step of the online softmax: new row maxima, rescaled totals, the factor of what was summed before."""
    new = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = _power(largest, new, qk_scale, EXACT)
    return new, total * shrink, shrink


@triton.jit
def _fast_step(
    state, q, k_base, v_base, start, zero_q, zero_v, qk_scale, column, BLOCK_KV: tl.constexpr, LK: tl.constexpr,
    D: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, ZERO_Q: tl.constexpr, ZERO_V: tl.constexpr,
    ASM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to (maxima, totals, sums [BLOCK_Q, BLOCK_D]); probabilities and values in float16."""
    largest, total, acc = state
    key = start + tl.arange(0, BLOCK_KV)
    k = _rows(k_base, key, column, K_ROW, LK, D, MASKED)
    scores = _scores(q, k, zero_q, None, key, LK, ZERO_Q, MASKED)
    v = _values(_rows(v_base, key, column, V_ROW, LK, D, MASKED), zero_v, ZERO_V, ASM)
    largest, total, shrink = _online(scores, largest, total, qk_scale, False)
    p = _power(scores, largest[:, None], qk_scale, False).to(tl.float16)
    total += tl.sum(p.to(tl.float32), axis=1)  # of the rounded ones: their weights add up to 1
    return largest, total, tl.dot(p, v, acc * shrink[:, None])


@triton.jit
def _moment_step(
    state, q, k_base, start, zero_q, row_term, qk_scale, column, BLOCK_KV: tl.constexpr, LK: tl.constexpr,
    D: tl.constexpr, K_ROW: tl.constexpr, ZERO_Q: tl.constexpr, EXACT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """First pass of the mode with codes: row maxima and totals."""
    largest, total = state
    key = start + tl.arange(0, BLOCK_KV)
    k = _rows(k_base, key, column, K_ROW, LK, D, MASKED)
    scores = _scores(q, k, zero_q, row_term, key, LK, ZERO_Q, MASKED)
    largest, total, _ = _online(scores, largest, total, qk_scale, EXACT)
    return largest, total + tl.sum(_power(scores, largest[:, None], qk_scale, EXACT), axis=1)


@triton.jit
def _codes_step(
    state, moments, q, k_base, v_base, start, zero_q, row_term, qk_scale, s_p, zero_p, column,
    BLOCK_KV: tl.constexpr, LK: tl.constexpr, D: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    ZERO_Q: tl.constexpr, PMIN: tl.constexpr, PMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Second pass: add sum p v, sum p, sum v over one block of keys, all int32, p and v being codes."""
    acc, p_sum, v_sum = state
    largest, total = moments
    key = start + tl.arange(0, BLOCK_KV)
    k = _rows(k_base, key, column, K_ROW, LK, D, MASKED)
    v = _rows(v_base, key, column, V_ROW, LK, D, MASKED)
    power = _power(_scores(q, k, zero_q, row_term, key, LK, ZERO_Q, MASKED), largest[:, None], qk_scale, EXACT)
    if EXACT:
        p = to_codes(tl.div_rn(power, total[:, None]), s_p, zero_p, 1.0, PMIN, PMAX, True, False)
    else:
        p = to_codes(power, 1.0, zero_p, (1.0 / (total * s_p))[:, None], PMIN, PMAX, False, ASM)
    if MASKED:
        p = tl.where((key < LK)[None, :], p, 0)
    p = p.to(tl.int8)
    p_sum += tl.sum(p.to(tl.int32), axis=1)
    v_sum += tl.sum(v.to(tl.int32), axis=0)
    return acc + tl.dot(p, v, out_dtype=tl.int32), p_sum, v_sum


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, params_ptr, post_ptr, out_ptr, out_q_ptr,
    batch,
    LQ: tl.constexpr, LK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    Q_BATCH: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
    K_BATCH: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
    V_BATCH: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    ZERO_Q: tl.constexpr, ZERO_K: tl.constexpr, ZERO_V: tl.constexpr,
    P_CODES: tl.constexpr, PMIN: tl.constexpr, PMAX: tl.constexpr,
    OUT: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head of one image; see `edadm_compile.kernels.attention`."""
    begin(OVERLAP)
    BLOCK_D: tl.constexpr = max(32, triton.next_power_of_2(D))
    WHOLE: tl.constexpr = LK // BLOCK_KV * BLOCK_KV  # keys in blocks that need no mask
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    qk_scale, zero_q, zero_k = tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2)
    s_v, zero_v, s_p, zero_p = (
        tl.load(params_ptr + 3), tl.load(params_ptr + 4), tl.load(params_ptr + 5), tl.load(params_ptr + 6)
    )  # fmt: skip
    row, column = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    k_base = k_ptr + image * K_BATCH + head * K_HEAD
    v_base = v_ptr + image * V_BATCH + head * V_HEAD
    q = _rows(q_ptr + image * Q_BATCH + head * Q_HEAD, row, column, Q_ROW, LQ, D, True)  # [BLOCK_Q, BLOCK_D]

    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    if P_CODES:
        row_term = None
        if ZERO_K:
            q_sum = tl.sum(q.to(tl.int32), axis=1).to(tl.float32)
            row_term = D * zero_q * zero_k - zero_k * q_sum
        moments = (largest, total)
        for start in range(0, WHOLE, BLOCK_KV):
            moments = _moment_step(moments, q, k_base, start, zero_q, row_term, qk_scale, column,
                                   BLOCK_KV, LK, D, K_ROW, ZERO_Q, EXACT, False)  # fmt: skip
        if WHOLE < LK:
            moments = _moment_step(moments, q, k_base, WHOLE, zero_q, row_term, qk_scale, column,
                                   BLOCK_KV, LK, D, K_ROW, ZERO_Q, EXACT, True)  # fmt: skip
        state = (tl.zeros([BLOCK_Q, BLOCK_D], tl.int32), tl.zeros([BLOCK_Q], tl.int32), tl.zeros([BLOCK_D], tl.int32))
        for start in range(0, WHOLE, BLOCK_KV):
            state = _codes_step(state, moments, q, k_base, v_base, start, zero_q, row_term, qk_scale, s_p, zero_p,
                                column, BLOCK_KV, LK, D, K_ROW, V_ROW, ZERO_Q, PMIN, PMAX, EXACT, ASM,
                                False)  # fmt: skip
        if WHOLE < LK:
            state = _codes_step(state, moments, q, k_base, v_base, WHOLE, zero_q, row_term, qk_scale, s_p, zero_p,
                                column, BLOCK_KV, LK, D, K_ROW, V_ROW, ZERO_Q, PMIN, PMAX, EXACT, ASM,
                                True)  # fmt: skip
        acc, p_sum, v_sum = state
        zero_pi, zero_vi = zero_p.to(tl.int32), zero_v.to(tl.int32)
        acc -= zero_vi * p_sum[:, None] + zero_pi * v_sum[None, :] - LK * zero_pi * zero_vi
        result = acc.to(tl.float32) * (s_p * s_v)
    else:
        state = (largest, total, tl.zeros([BLOCK_Q, BLOCK_D], tl.float32))
        for start in range(0, WHOLE, BLOCK_KV):
            state = _fast_step(state, q, k_base, v_base, start, zero_q, zero_v, qk_scale, column,
                               BLOCK_KV, LK, D, K_ROW, V_ROW, ZERO_Q, ZERO_V, ASM, False)  # fmt: skip
        if WHOLE < LK:
            state = _fast_step(state, q, k_base, v_base, WHOLE, zero_q, zero_v, qk_scale, column,
                               BLOCK_KV, LK, D, K_ROW, V_ROW, ZERO_Q, ZERO_V, ASM, True)  # fmt: skip
        largest, total, acc = state
        result = acc * (s_v / total)[:, None]

    mask = (row < LQ)[:, None] & (column < D)[None, :]
    if OUT:
        out = out_ptr + image * (LQ * OUT_STRIDE) + head * D + row[:, None] * OUT_STRIDE + column[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)
    if OUT_Q:
        scale, zero, inverse = tl.load(post_ptr), tl.load(post_ptr + 1), tl.load(post_ptr + 2)
        out_q = out_q_ptr + image * (LQ * OUT_Q_STRIDE) + head * D + row[:, None] * OUT_Q_STRIDE + column[None, :]
        tl.store(out_q, to_codes(result, scale, zero, inverse, QMIN, QMAX, EXACT, ASM), mask=mask)
