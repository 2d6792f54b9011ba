# mypy: ignore-errors
"""Main loops for sm_90: copies and matrix products both asynchronous, K steps in STAGES buffers of shared memory.

What each step does, and why nothing is read too early or overwritten too late (`slot` = step % STAGES):

1. Wait until this thread's copies of the step have arrived. Every step commits one group of copies, empty ones at
   the end included, so at the top of a step STAGES - 1 + step groups exist; all but the newest STAGES - 2 of them are
   groups 0..step. The barrier that Triton puts behind the wait makes it so for the copies of all threads.
2. Fence: the copies wrote through the generic proxy, wgmma reads through the asynchronous one. A proxy fence between
   the barrier and the read, in the reading thread, lies on the path from each write to each read.
3. Issue the product of this step; the previous one may still run, in order on the same tensor core.
4. Wait until only this product is in flight: the previous one has read its slot, as far as this warp group goes. The
   barrier makes it so for all warps (each waits for its own rows only).
5. Start the copies of step + STAGES - 1 into that free slot. Nobody reads it: it is not `slot` of this step, and
   steps up to step + STAGES - 2 lie in the STAGES - 2 others.

With fewer steps than STAGES - 1 the first copies stop at the last step, the groups stay counted, and step 5 copies
nothing. Behind the last step no copy is in flight (those of the last step have arrived, later groups are empty) and,
after the last wait, no product: the epilogue may reuse the memory behind a barrier.

4-bit weights go through registers, and a product in flight reads those. The fragments of a step are made between 2 and
3, while the previous products run on theirs; what step - 2 used is free since 4 of the previous step. Two things keep
it so: the loop does two steps per iteration, so that neighbouring steps have their own variables (with one, the next
fragments would be written to variables in use; carried over the iterations, they would be taken apart into bytes),
and the loads that fragments come from cannot move before the barrier of 1. ptxas keeps registers of products in flight
until the wait; in its output no instruction between writes them (checked on the machine code of 3.6 and 3.9). The
fragments are not named in the wait: it takes values of 32 bits only.
"""

import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from edadm_compile.kernels.gluon.copies import copy_step
from edadm_compile.kernels.gluon.layouts import accumulator_layout, copy_layout, fragment_layout, operand_layout
from edadm_compile.kernels.triton.weights import unpack_int4


@gluon.jit
def start_products(acc, w_buffer, x_buffer, x_high_buffer, BITS: gl.constexpr, ASM: gl.constexpr, LAYOUT: gl.constexpr):
    """`acc` plus one K step, in flight: a group of products with 8-bit weights, two with 4-bit weights.

    8-bit weights are read from shared memory; 4-bit weights pass through registers, unpacked they are wgmma's first
    operand.
    """
    if BITS == 4:
        low, high = unpack_int4(w_buffer.load(LAYOUT), ASM)
        acc = warpgroup_mma(low, x_buffer.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma(high, x_high_buffer.permute((1, 0)), acc, is_async=True)
    else:
        acc = warpgroup_mma(w_buffer, x_buffer.permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def multiply_step(
    acc, slot, step, last, w_buffers, x_buffers, x_high_buffers, w_ptrs, origin, pad_ptr, h0, w0, H: gl.constexpr,
    W: gl.constexpr, X_STRIDE: gl.constexpr, KW: gl.constexpr, DIL_H: gl.constexpr, DIL_W: gl.constexpr,
    UPSAMPLE: gl.constexpr, BLOCKS: gl.constexpr, BORDER: gl.constexpr, BITS: gl.constexpr, ASM: gl.constexpr,
    PART: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Points 1 to 5 above; returns `acc`, still in flight, and the slot of the next step."""
    AHEAD: gl.constexpr = STAGES - 1
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    w_buffer, x_buffer, x_high_buffer = w_buffers.index(slot), x_buffers.index(slot), x_high_buffers.index(slot)
    acc = start_products(acc, w_buffer, x_buffer, x_high_buffer, BITS, ASM, LAYOUT)
    acc = warpgroup_mma_wait(8 // BITS, deps=[acc])
    tl.debug_barrier()
    free = gl.where(slot == 0, AHEAD, slot - 1)
    if step + AHEAD < last:
        copy_step(
            w_buffers.index(free), x_buffers.index(free), x_high_buffers.index(free), w_ptrs, origin, pad_ptr, h0, w0,
            step + AHEAD, H, W, X_STRIDE, KW, DIL_H, DIL_W, UPSAMPLE, BLOCKS, BORDER, BITS, PART,
        )  # fmt: skip
    else:
        async_copy.commit_group()
    return acc, gl.where(slot == AHEAD, 0, slot + 1)


@gluon.jit
def accumulate(
    x_ptr, pad_ptr, w_ptr, first_row, image, h0, w0, H: gl.constexpr, W: gl.constexpr, X_STRIDE: gl.constexpr,
    KH: gl.constexpr, KW: gl.constexpr, DIL_H: gl.constexpr, DIL_W: gl.constexpr, UPSAMPLE: gl.constexpr,
    KC: gl.constexpr, BITS: gl.constexpr, BORDER: gl.constexpr, ASM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """int32 [BLOCK_M, BLOCK_N] in `accumulator_layout`; 4-bit weights count 16-fold.

    Args:
        first_row: of the weights.
        image, h0, w0: int32 [BLOCK_N] in rows of `copy_layout`, see `tap_rows`.
    """
    WARPS: gl.constexpr = gl.num_warps()
    gl.static_assert(BLOCK_M % (16 * WARPS) == 0, "every warp takes 16 rows of a product")
    gl.static_assert(STAGES >= 2, "a step is copied while another one is multiplied")
    BLOCKS: gl.constexpr = KC // BLOCK_K
    STEPS: gl.constexpr = KH * KW * BLOCKS
    PART: gl.constexpr = BLOCK_K * BITS // 8
    layout: gl.constexpr = copy_layout(PART, WARPS)
    shared: gl.constexpr = operand_layout(PART)
    fragments: gl.constexpr = fragment_layout(BLOCK_N, WARPS)
    rows = first_row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    k = gl.arange(0, PART, layout=gl.SliceLayout(0, layout))
    w_ptrs = w_ptr + rows[:, None] * (STEPS * PART) + k[None, :]  # [BLOCK_M, PART]
    origin = x_ptr + image.to(gl.int64) * (H * W * X_STRIDE)
    if UPSAMPLE == 1:
        origin += (h0 * W + w0) * X_STRIDE
    w_buffers = gl.allocate_shared_memory(w_ptr.dtype.element_ty, [STAGES, BLOCK_M, PART], shared)
    x_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, PART], shared)
    x_high_buffers = x_buffers
    if BITS == 4:
        x_high_buffers = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, PART], shared)
    for step in gl.static_range(STAGES - 1):
        if step < STEPS:
            copy_step(
                w_buffers.index(step), x_buffers.index(step), x_high_buffers.index(step), w_ptrs, origin, pad_ptr, h0,
                w0, step, H, W, X_STRIDE, KW, DIL_H, DIL_W, UPSAMPLE, BLOCKS, BORDER, BITS, PART,
            )  # fmt: skip
        else:
            async_copy.commit_group()
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, accumulator_layout(BLOCK_N, WARPS))
    slot = 0
    # Plus the program index, which is 0: knowing the count, ptxas may unroll the whole loop.
    last = STEPS + gl.program_id(2)
    ODD: gl.constexpr = STEPS % 2 if BITS == 4 else 0
    for pair in range(0, last - ODD, 8 // BITS):
        for i in gl.static_range(8 // BITS):
            acc, slot = multiply_step(
                acc, slot, pair + i, last, w_buffers, x_buffers, x_high_buffers, w_ptrs, origin, pad_ptr, h0, w0, H, W,
                X_STRIDE, KW, DIL_H, DIL_W, UPSAMPLE, BLOCKS, BORDER, BITS, ASM, PART, STAGES, fragments,
            )  # fmt: skip
    if ODD:
        # Drained first: ptxas runs every product alone, the loop's as well, where one may be in flight here.
        acc = warpgroup_mma_wait(0, deps=[acc])
        async_copy.wait_group(0)
        fence_async_shared()
        acc = start_products(
            acc, w_buffers.index(slot), x_buffers.index(slot), x_high_buffers.index(slot), BITS, ASM, fragments
        )
    return warpgroup_mma_wait(0, deps=[acc])
