# mypy: ignore-errors
# ruff: noqa: E741
"""Integer convolution as an implicit matrix product; see `edadm_compile.kernels.qconv2d` for the arguments."""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.epilogue import combine, finish
from edadm_compile.kernels.triton.matmul import accumulate, exchange_partials, tile_order
from edadm_compile.kernels.triton.overlap import begin


@triton.jit
def qconv2d(
    x_ptr, w_ptr, multiplier_ptr, bias_ptr, pad_ptr, x2_ptr, w2_ptr, multiplier2_ptr, bias2_ptr, pad2_ptr, row_ptr,
    residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr, partial_ptr, counter_ptr, pixels,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, X_STRIDE: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_T: tl.constexpr, PAD_L: tl.constexpr, DIL_H: tl.constexpr,
    DIL_W: tl.constexpr, UPSAMPLE: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, O: tl.constexpr,
    KC: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, C2: tl.constexpr, X2_STRIDE: tl.constexpr,
    KC2: tl.constexpr, BITS2: tl.constexpr, ROW: tl.constexpr, ROW_STRIDE: tl.constexpr, RESIDUAL: tl.constexpr,
    RES_STRIDE: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr,
    OUT_NCHW: tl.constexpr, OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
    STATS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr, DOTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output channels x BLOCK_N output pixels."""
    PARTS: tl.constexpr = DOTS if BLOCK_K >= 64 else 1  # a dot needs a depth of 32
    O_PAD: tl.constexpr = (O + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    BORDER: tl.constexpr = (
        PAD_T > 0
        or PAD_L > 0
        or (OH - 1) * STRIDE_H - PAD_T + (KH - 1) * DIL_H >= H * UPSAMPLE
        or (OW - 1) * STRIDE_W - PAD_L + (KW - 1) * DIL_W >= W * UPSAMPLE
    )
    tiles_n = tl.cdiv(pixels, BLOCK_N)
    tile_m, tile_n = tile_order(O_PAD // BLOCK_M, tiles_n, 8)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pixel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    loaded = tl.minimum(pixel, pixels - 1)  # the tail reads a real pixel and is not stored
    image = loaded // (OH * OW)
    h0 = loaded % (OH * OW) // OW * STRIDE_H - PAD_T
    w0 = loaded % OW * STRIDE_W - PAD_L  # OW divides OH * OW
    begin(OVERLAP)
    acc, gate = accumulate(
        x_ptr, pad_ptr, w_ptr, rows, image, h0, w0, H, W, X_STRIDE, KH, KW, DIL_H, DIL_W, UPSAMPLE, KC, BITS, BORDER,
        GLU, O_PAD, ASM, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    acc2, gate2 = acc, gate
    if SEGMENTS == 2:
        acc2, gate2 = accumulate(
            x2_ptr, pad2_ptr, w2_ptr, rows, image, h0, w0, H, W, X2_STRIDE, KH, KW, DIL_H, DIL_W, UPSAMPLE, KC2, BITS2,
            BORDER, GLU, O_PAD, ASM, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
        )  # fmt: skip
    if SPLIT_K > 1:
        last, acc, gate, acc2, gate2 = exchange_partials(
            acc, gate, acc2, gate2, partial_ptr, counter_ptr, rows, pixel, tiles_n * BLOCK_N, O_PAD, SEGMENTS, GLU,
            SPLIT_K,
        )  # fmt: skip
        if not last:
            return
    value, gate_value = combine(
        acc, gate, acc2, gate2, multiplier_ptr, bias_ptr, multiplier2_ptr, bias2_ptr, rows, O_PAD, BITS, BITS2,
        SEGMENTS, GLU,
    )  # fmt: skip
    finish(
        value, gate_value, rows, pixel, tile_n, pixels, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr,
        OH * OW, O, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, GLU, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q, OUT_Q_STRIDE,
        QMIN, QMAX, STATS, EXACT, BLOCK_N,
    )  # fmt: skip
