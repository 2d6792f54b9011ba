# mypy: ignore-errors
"""Attention on floating-point operands, flash style: the matrix of scores exists only in tiles."""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.attention import LOG2_E, _rows
from edadm_compile.kernels.triton.overlap import begin
from edadm_compile.kernels.triton.rounding import to_codes


@triton.jit
def _step(
    state, q, k_base, v_base, start, column, factor, BLOCK_KV: tl.constexpr, LK: tl.constexpr, D: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to (maxima, totals, sums [BLOCK_Q, BLOCK_D]); `factor` is the scale times log2 e."""
    largest, total, acc = state
    key = start + tl.arange(0, BLOCK_KV)
    k = _rows(k_base, key, column, K_ROW, LK, D, MASKED)
    v = _rows(v_base, key, column, V_ROW, LK, D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor  # [BLOCK_Q, BLOCK_KV]
    if MASKED:
        scores = tl.where((key < LK)[None, :], scores, float("-inf"))
    new = tl.maximum(largest, tl.max(scores, axis=1))
    shrink = tl.exp2(largest - new)
    p = tl.exp2(scores - new[:, None]).to(v.dtype)
    total = total * shrink + tl.sum(p.to(tl.float32), axis=1)  # of the rounded ones: their weights add up to 1
    return new, total, tl.dot(p, v, acc * shrink[:, None], input_precision="ieee")


@triton.jit
def attention_float(
    q_ptr, k_ptr, v_ptr, post_ptr, out_ptr, out_q_ptr,
    batch,
    LQ: tl.constexpr, LK: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    Q_BATCH: tl.constexpr, Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr,
    K_BATCH: tl.constexpr, K_ROW: tl.constexpr, K_HEAD: tl.constexpr,
    V_BATCH: tl.constexpr, V_ROW: tl.constexpr, V_HEAD: tl.constexpr,
    SCALE: tl.constexpr,
    OUT: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries of one head of one image; see `edadm_compile.kernels.attention_float`."""
    begin(OVERLAP)
    BLOCK_D: tl.constexpr = max(16, triton.next_power_of_2(D))
    # Keys in blocks that need no mask. With few keys a second copy of the step costs more registers than masks do.
    WHOLE: tl.constexpr = LK // BLOCK_KV * BLOCK_KV if LK % BLOCK_KV == 0 or LK >= 16 * BLOCK_KV else 0
    once = tl.minimum(batch, 1)  # 1, but the compiler must not unroll the loops
    image, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, column = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    k_base = k_ptr + image * K_BATCH + head * K_HEAD
    v_base = v_ptr + image * V_BATCH + head * V_HEAD
    q = _rows(q_ptr + image * Q_BATCH + head * Q_HEAD, row, column, Q_ROW, LQ, D, True)  # [BLOCK_Q, BLOCK_D]
    state = (
        tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32),
        tl.zeros([BLOCK_Q, BLOCK_D], tl.float32),
    )  # fmt: skip
    for start in range(0, WHOLE * once, BLOCK_KV):
        state = _step(state, q, k_base, v_base, start, column, SCALE * LOG2_E, BLOCK_KV, LK, D, K_ROW, V_ROW, False)
    if WHOLE < LK:
        for start in range(WHOLE, LK * once, BLOCK_KV):
            state = _step(state, q, k_base, v_base, start, column, SCALE * LOG2_E, BLOCK_KV, LK, D, K_ROW, V_ROW, True)
    _, total, acc = state
    result = tl.div_rn(acc, total[:, None] + tl.zeros_like(acc))
    mask = (row < LQ)[:, None] & (column < D)[None, :]
    if OUT:
        out = out_ptr + image * (LQ * OUT_STRIDE) + head * D + row[:, None] * OUT_STRIDE + column[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=mask)
    if OUT_Q:
        scale, zero, inverse = tl.load(post_ptr), tl.load(post_ptr + 1), tl.load(post_ptr + 2)
        out_q = out_q_ptr + image * (LQ * OUT_Q_STRIDE) + head * D + row[:, None] * OUT_Q_STRIDE + column[None, :]
        tl.store(out_q, to_codes(result, scale, zero, inverse, QMIN, QMAX, EXACT, ASM), mask=mask)
