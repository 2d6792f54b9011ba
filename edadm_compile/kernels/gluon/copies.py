# mypy: ignore-errors
"""Asynchronous copies (cp.async) of the operands of one K step from global to shared memory."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from edadm_compile.kernels.gluon.layouts import copy_layout

#: Triton 3.9 calls it async_load, and keeps the old name only to say so.
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def tap_rows(
    origin, pad_ptr, h0, w0, tap, H: gl.constexpr, W: gl.constexpr, X_STRIDE: gl.constexpr, KW: gl.constexpr,
    DIL_H: gl.constexpr, DIL_W: gl.constexpr, UPSAMPLE: gl.constexpr, BORDER: gl.constexpr,
):  # fmt: skip
    """Where channel 0 of the pixels that one tap reads lies, [BLOCK_N] pointers.

    As `edadm_compile.kernels.triton.matmul.tap_rows`: a pixel outside the image reads the row of the code that means
    zero, so copies need no mask and a zero point no correction.
    """
    down, right = tap // KW * DIL_H, tap % KW * DIL_W
    h, w = h0 + down, w0 + right
    offset = ((h >> 1) * W + (w >> 1)) * X_STRIDE if UPSAMPLE == 2 else (down * W + right) * X_STRIDE
    rows = origin + offset
    if BORDER:
        inside = (h.to(gl.uint32, bitcast=True) < H * UPSAMPLE) & (w.to(gl.uint32, bitcast=True) < W * UPSAMPLE)
        rows = gl.where(inside, rows, pad_ptr + gl.zeros_like(h))
    return rows


@gluon.jit
def copy_step(
    w_buffer, x_buffer, x_high_buffer, w_ptrs, origin, pad_ptr, h0, w0, step, H: gl.constexpr, W: gl.constexpr,
    X_STRIDE: gl.constexpr, KW: gl.constexpr, DIL_H: gl.constexpr, DIL_W: gl.constexpr, UPSAMPLE: gl.constexpr,
    BLOCKS: gl.constexpr, BORDER: gl.constexpr, BITS: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """Start the copies of one K step and make them one group.

    Args:
        w_buffer: int8 or uint8 [BLOCK_M, PART], this step's weights.
        x_buffer, x_high_buffer: int8 [BLOCK_N, PART], the first PART codes of the step, and with 4-bit weights the
            next PART (`edadm_compile.kernels.constants.interleave`).
        w_ptrs: [BLOCK_M, PART] pointers to the weights of step 0.
        origin, h0, w0: [BLOCK_N], see `tap_rows`.
        BLOCKS: steps per tap.
    """
    DEPTH: gl.constexpr = PART * 8 // BITS
    k = gl.arange(0, PART, layout=gl.SliceLayout(0, copy_layout(PART, gl.num_warps())))
    pixels = tap_rows(origin, pad_ptr, h0, w0, step // BLOCKS, H, W, X_STRIDE, KW, DIL_H, DIL_W, UPSAMPLE, BORDER)
    x_ptrs = pixels[:, None] + (step % BLOCKS * DEPTH + k)[None, :]  # [BLOCK_N, PART]
    # The compiler does not see through the choice of pointers; without this the copies are of single bytes.
    x_ptrs = gl.max_contiguous(gl.multiple_of(x_ptrs, (1, 16)), (1, PART))
    copy_to_shared(w_buffer, w_ptrs + step * PART)
    copy_to_shared(x_buffer, x_ptrs)
    if BITS == 4:
        copy_to_shared(x_high_buffer, x_ptrs + PART)
    async_copy.commit_group()
