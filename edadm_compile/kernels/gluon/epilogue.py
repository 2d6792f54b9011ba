# mypy: ignore-errors
# ruff: noqa: E741
"""From the accumulators of a tile to memory: the portable epilogue, a few pixels at a time.

The arithmetic is that of `edadm_compile.kernels.triton.epilogue`, compiled from the same source. What differs is how
values get into its layout, neighbouring channels in one thread: through shared memory, from where a loop takes
them in chunks of pixels. A whole tile at once is 128 accumulators per thread, and the epilogue would spill.
"""

import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon

from edadm_compile.kernels.gluon.layouts import output_layout, staging_layout
from edadm_compile.kernels.triton.epilogue import affine, finish

#: The method of a buffer that sees it in another shape lost its underscore in Triton 3.9.
_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def finish_chunk(
    acc, rows, first_pixel, chunk, pixels, multiplier_ptr, bias_ptr, row_ptr, residual_ptr, post_ptr, out_ptr,
    out_q_ptr, stats_ptr, PER_IMAGE: gl.constexpr, O: gl.constexpr, BITS: gl.constexpr, ROW: gl.constexpr,
    ROW_STRIDE: gl.constexpr, RESIDUAL: gl.constexpr, RES_STRIDE: gl.constexpr, ACT: gl.constexpr, OUT: gl.constexpr,
    OUT_STRIDE: gl.constexpr, OUT_NCHW: gl.constexpr, OUT_Q: gl.constexpr, OUT_Q_STRIDE: gl.constexpr,
    QMIN: gl.constexpr, QMAX: gl.constexpr, STATS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_M, CHUNK] to every output; `chunk` counts chunks of CHUNK pixels from pixel 0 of the launch."""
    CHUNK: gl.constexpr = acc.shape[1]
    pixel = first_pixel + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, acc.type.layout))
    value = affine(acc, multiplier_ptr, bias_ptr, rows, BITS)
    finish(
        value, value, rows, pixel, chunk, pixels, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr,
        PER_IMAGE, O, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, False, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q,
        OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT, CHUNK,
    )  # fmt: skip


@gluon.jit
def finish_tile(
    acc, tile_m, tile_n, pixels, multiplier_ptr, bias_ptr, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr,
    stats_ptr, PER_IMAGE: gl.constexpr, O: gl.constexpr, BITS: gl.constexpr, ROW: gl.constexpr,
    ROW_STRIDE: gl.constexpr, RESIDUAL: gl.constexpr, RES_STRIDE: gl.constexpr, ACT: gl.constexpr, OUT: gl.constexpr,
    OUT_STRIDE: gl.constexpr, OUT_NCHW: gl.constexpr, OUT_Q: gl.constexpr, OUT_Q_STRIDE: gl.constexpr,
    QMIN: gl.constexpr, QMAX: gl.constexpr, STATS: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_M, BLOCK_N] in the layout of the products to every output."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    # Statistics are of whole tiles, and planes of pixels want another order; both are for 64 values per thread.
    CHUNKS: gl.constexpr = 1 if STATS or OUT_NCHW else BLOCK_M * BLOCK_N // (WARPS * 1024)
    CHUNK: gl.constexpr = BLOCK_N // CHUNKS
    layout: gl.constexpr = output_layout(BLOCK_M, CHUNK, WARPS, OUT_NCHW)
    rows = tile_m * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    if CHUNKS == 1:
        finish_chunk(
            gl.convert_layout(acc, layout), rows, tile_n * BLOCK_N, tile_n, pixels, multiplier_ptr, bias_ptr, row_ptr,
            residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr, PER_IMAGE, O, BITS, ROW, ROW_STRIDE, RESIDUAL,
            RES_STRIDE, ACT, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q, OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT,
        )  # fmt: skip
    else:
        shared: gl.constexpr = staging_layout()
        staging = gl.allocate_shared_memory(gl.int32, [CHUNKS, BLOCK_M, CHUNK], shared)
        # Pixels are the slow dimension, so chunks one after the other are the tile.
        if _PUBLIC:
            whole = staging.reinterpret(gl.int32, [BLOCK_M, BLOCK_N], shared)
        else:
            whole = staging._reinterpret(gl.int32, [BLOCK_M, BLOCK_N], shared)
        tl.debug_barrier()  # the memory is that of the operands, which other warps may have read until now
        whole.store(acc)
        tl.debug_barrier()
        # A chunk all of which lies behind the last pixel is left out: the row of its image does not exist.
        for chunk in range(gl.minimum(gl.cdiv(pixels - tile_n * BLOCK_N, CHUNK), CHUNKS)):
            finish_chunk(
                staging.index(chunk).load(layout), rows, tile_n * BLOCK_N + chunk * CHUNK, tile_n * CHUNKS + chunk,
                pixels, multiplier_ptr, bias_ptr, row_ptr, residual_ptr, post_ptr, out_ptr, out_q_ptr, stats_ptr,
                PER_IMAGE, O, BITS, ROW, ROW_STRIDE, RESIDUAL, RES_STRIDE, ACT, OUT, OUT_STRIDE, OUT_NCHW, OUT_Q,
                OUT_Q_STRIDE, QMIN, QMAX, STATS, EXACT,
            )  # fmt: skip
