# mypy: ignore-errors
# ruff: noqa: E741
"""Integer convolution for sm_90; see `edadm_compile.kernels.qconv2d_sm90` for what it takes."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from edadm_compile.kernels.gluon.epilogue import finish_tile
from edadm_compile.kernels.gluon.layouts import copy_layout
from edadm_compile.kernels.gluon.matmul import accumulate
from edadm_compile.kernels.triton.matmul import tile_order
from edadm_compile.kernels.triton.overlap import begin


@gluon.jit
def qconv2d_sm90(
    x_ptr, w_ptr, multiplier_ptr, bias_ptr, pad_ptr, x2_ptr, w2_ptr, multiplier2_ptr, bias2_ptr, pad2_ptr, row_ptr,
    residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr, partial_ptr, counter_ptr, pixels,
    H: gl.constexpr, W: gl.constexpr, C: gl.constexpr, X_STRIDE: gl.constexpr, KH: gl.constexpr, KW: gl.constexpr,
    STRIDE_H: gl.constexpr, STRIDE_W: gl.constexpr, PAD_T: gl.constexpr, PAD_L: gl.constexpr, DIL_H: gl.constexpr,
    DIL_W: gl.constexpr, UPSAMPLE: gl.constexpr, OH: gl.constexpr, OW: gl.constexpr, O: gl.constexpr,
    KC: gl.constexpr, BITS: gl.constexpr, SEGMENTS: gl.constexpr, C2: gl.constexpr, X2_STRIDE: gl.constexpr,
    KC2: gl.constexpr, BITS2: gl.constexpr, ROW: gl.constexpr, ROW_STRIDE: gl.constexpr, RESIDUAL: gl.constexpr,
    RES_STRIDE: gl.constexpr, ACT: gl.constexpr, GLU: gl.constexpr, OUT: gl.constexpr, OUT_STRIDE: gl.constexpr,
    OUT_NCHW: gl.constexpr, OUT_Q: gl.constexpr, OUT_Q_STRIDE: gl.constexpr, QMIN: gl.constexpr, QMAX: gl.constexpr,
    STATS: gl.constexpr, EXACT: gl.constexpr, ASM: gl.constexpr, OVERLAP: gl.constexpr, DOTS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output channels x BLOCK_N output pixels."""
    O_PAD: gl.constexpr = (O + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    WARPS: gl.constexpr = gl.num_warps()
    BORDER: gl.constexpr = (
        PAD_T > 0
        or PAD_L > 0
        or (OH - 1) * STRIDE_H - PAD_T + (KH - 1) * DIL_H >= H * UPSAMPLE
        or (OW - 1) * STRIDE_W - PAD_L + (KW - 1) * DIL_W >= W * UPSAMPLE
    )
    tile_m, tile_n = tile_order(O_PAD // BLOCK_M, gl.cdiv(pixels, BLOCK_N), 8)
    pixel = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copy_layout(BLOCK_K * BITS // 8, WARPS)))
    loaded = gl.minimum(pixel, pixels - 1)  # the tail reads a real pixel and is not stored
    image = loaded // (OH * OW)
    h0 = loaded % (OH * OW) // OW * STRIDE_H - PAD_T
    w0 = loaded % OW * STRIDE_W - PAD_L  # OW divides OH * OW
    begin(OVERLAP)
    acc = accumulate(
        x_ptr, pad_ptr, w_ptr, tile_m * BLOCK_M, image, h0, w0, H, W, X_STRIDE, KH, KW, DIL_H, DIL_W, UPSAMPLE, KC,
        BITS, BORDER, ASM, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    finish_tile(
        acc, tile_m, tile_n, pixels, multiplier_ptr, bias_ptr, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr,
        stats_ptr, OH * OW, O, BITS, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q,
        OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT,
    )  # fmt: skip
