# mypy: ignore-errors
# ruff: noqa: E741
"""Integer matrix product; see `edadm_compile.kernels.qlinear` for the arguments.

The same loop as the convolution, of images of one pixel: tap and position arithmetic folds away.
"""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.epilogue import combine, finish
from edadm_compile.kernels.triton.matmul import accumulate, exchange_partials, tile_order
from edadm_compile.kernels.triton.overlap import begin


@triton.jit
def qlinear(
    x_ptr, w_ptr, multiplier_ptr, bias_ptr, x2_ptr, w2_ptr, multiplier2_ptr, bias2_ptr, row_ptr, residual_ptr,
    post_ptr, out_ptr, out_q_ptr, stats_ptr, partial_ptr, counter_ptr, rows,
    C: tl.constexpr, X_STRIDE: tl.constexpr, O: tl.constexpr, KC: tl.constexpr, BITS: tl.constexpr,
    SEGMENTS: tl.constexpr, C2: tl.constexpr, X2_STRIDE: tl.constexpr, KC2: tl.constexpr, BITS2: tl.constexpr,
    ROWS_PER_IMAGE: tl.constexpr, ROW: tl.constexpr, ROW_STRIDE: tl.constexpr, RESIDUAL: tl.constexpr,
    RES_STRIDE: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr,
    OUT_NCHW: tl.constexpr, OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    STATS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr, DOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output channels x BLOCK_N rows of the activations."""
    PARTS: tl.constexpr = DOTS if BLOCK_K >= 64 else 1  # a dot needs a depth of 32
    O_PAD: tl.constexpr = (O + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    tiles_n = tl.cdiv(rows, BLOCK_N)
    tile_m, tile_n = tile_order(O_PAD // BLOCK_M, tiles_n, 8)
    channels = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    loaded = tl.minimum(row, rows - 1)  # the tail reads a real row and is not stored
    origin = tl.zeros_like(loaded)
    begin(OVERLAP)
    acc, gate = accumulate(
        x_ptr, None, w_ptr, channels, loaded, origin, origin, 1, 1, X_STRIDE, 1, 1, 1, 1, 1, KC, BITS, False,
        GLU, O_PAD, ASM, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    acc2, gate2 = acc, gate
    if SEGMENTS == 2:
        acc2, gate2 = accumulate(
            x2_ptr, None, w2_ptr, channels, loaded, origin, origin, 1, 1, X2_STRIDE, 1, 1, 1, 1, 1, KC2, BITS2, False,
            GLU, O_PAD, ASM, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
        )  # fmt: skip
    if SPLIT_K > 1:
        last, acc, gate, acc2, gate2 = exchange_partials(
            acc, gate, acc2, gate2, partial_ptr, counter_ptr, channels, row, tiles_n * BLOCK_N, O_PAD, SEGMENTS, GLU,
            SPLIT_K,
        )  # fmt: skip
        if not last:
            return
    value, gate_value = combine(
        acc, gate, acc2, gate2, multiplier_ptr, bias_ptr, multiplier2_ptr, bias2_ptr, channels, O_PAD, BITS, BITS2,
        SEGMENTS, GLU,
    )  # fmt: skip
    finish(
        value, gate_value, channels, row, tile_n, rows, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr,
        ROWS_PER_IMAGE, O, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, GLU, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q,
        OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT, BLOCK_N,
    )  # fmt: skip
