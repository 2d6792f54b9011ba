# mypy: ignore-errors
"""Who holds what: how tiles lie in shared memory and over the threads of a program (4 warps, or 8)."""

import triton.experimental.gluon.language as gl
from triton.experimental.gluon import constexpr_function


@constexpr_function
def copy_layout(DEPTH, WARPS):
    """Of the pointers of an asynchronous copy of a tile [rows, DEPTH bytes]: 16 bytes per thread, rows over warps."""
    return gl.BlockedLayout([1, 16], [32 * 16 // DEPTH, DEPTH // 16], [WARPS, 1], [1, 0])


@constexpr_function
def operand_layout(DEPTH):
    """Of K-major tiles [rows, DEPTH] int8 in shared memory, as wgmma reads them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(DEPTH, 128), element_bitwidth=8, rank=2)


@constexpr_function
def accumulator_layout(BLOCK_N, WARPS):
    """Of int32 [BLOCK_M, BLOCK_N] in registers. A wgmma of bytes is 64 rows high and at most 128 columns wide here."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, min(BLOCK_N, 128), 32])


@constexpr_function
def fragment_layout(BLOCK_N, WARPS):
    """Of int8 [BLOCK_M, depth] in registers as the first operand of wgmma; four neighbours in K are a word."""
    return gl.DotOperandLayout(0, accumulator_layout(BLOCK_N, WARPS), 4)


@constexpr_function
def output_layout(BLOCK_M, BLOCK_N, WARPS, ALONG_N):
    """Of float32 [BLOCK_M, BLOCK_N] behind the accumulators: neighbours of the output in memory in one thread.

    Eight channels of a pixel are 16 bytes in a 16-bit type; ALONG_N (OUT_NCHW) has pixels as neighbours.
    """
    if ALONG_N:
        lanes = min(32, BLOCK_N // 4)
        return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [WARPS, 1], [1, 0])
    lanes = min(32, BLOCK_M // 8)
    return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, WARPS], [0, 1])


@constexpr_function
def staging_layout():
    """Of int32 [BLOCK_M, pixels] on its way between the two layouts above, channels next to each other.

    A warp of the accumulators writes 8 channels of 4 pixels at a time, every second one: groups of 8 channels change
    places with the pair of pixels, so that these are 32 different banks. Reads are of whole groups.
    """
    return gl.SwizzledSharedLayout(vec=8, per_phase=2, max_phase=4, order=[0, 1])
