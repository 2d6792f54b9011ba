# mypy: ignore-errors
# ruff: noqa: E741
"""Integer matrix product for sm_90; see `edadm_compile.kernels.qlinear_sm90` for what it takes."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from edadm_compile.kernels.gluon.epilogue import finish_tile
from edadm_compile.kernels.gluon.layouts import copy_layout
from edadm_compile.kernels.gluon.matmul import accumulate
from edadm_compile.kernels.triton.matmul import tile_order
from edadm_compile.kernels.triton.overlap import begin


@gluon.jit
def qlinear_sm90(
    x_ptr, w_ptr, multiplier_ptr, bias_ptr, x2_ptr, w2_ptr, multiplier2_ptr, bias2_ptr, row_ptr, residual_ptr,
    post_ptr, out_ptr, out_q_ptr, stats_ptr, partial_ptr, counter_ptr, rows,
    C: gl.constexpr, X_STRIDE: gl.constexpr, O: gl.constexpr, KC: gl.constexpr, BITS: gl.constexpr,
    SEGMENTS: gl.constexpr, C2: gl.constexpr, X2_STRIDE: gl.constexpr, KC2: gl.constexpr, BITS2: gl.constexpr,
    ROWS_PER_IMAGE: gl.constexpr, ROW: gl.constexpr, ROW_STRIDE: gl.constexpr, RESIDUAL: gl.constexpr,
    RES_STRIDE: gl.constexpr, ACT: gl.constexpr, GLU: gl.constexpr, OUT: gl.constexpr, OUT_STRIDE: gl.constexpr,
    OUT_NCHW: gl.constexpr, OUT_Q: gl.constexpr, OUT_Q_STRIDE: gl.constexpr, QMIN: gl.constexpr, QMAX: gl.constexpr,
    STATS: gl.constexpr, EXACT: gl.constexpr, ASM: gl.constexpr, OVERLAP: gl.constexpr, DOTS: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SPLIT_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M output channels x BLOCK_N rows of the activations."""
    O_PAD: gl.constexpr = (O + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    WARPS: gl.constexpr = gl.num_warps()
    tile_m, tile_n = tile_order(O_PAD // BLOCK_M, gl.cdiv(rows, BLOCK_N), 8)
    pixel = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, copy_layout(BLOCK_K * BITS // 8, WARPS)))
    loaded = gl.minimum(pixel, rows - 1)
    origin = gl.zeros_like(loaded)
    begin(OVERLAP)
    acc = accumulate(
        x_ptr, None, w_ptr, tile_m * BLOCK_M, loaded, origin, origin, 1, 1, X_STRIDE, 1, 1, 1, 1, 1, KC, BITS,
        False, ASM, BLOCK_M, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    finish_tile(
        acc, tile_m, tile_n, rows, multiplier_ptr, bias_ptr, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr,
        stats_ptr, ROWS_PER_IMAGE, O, BITS, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q,
        OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT,
    )  # fmt: skip
