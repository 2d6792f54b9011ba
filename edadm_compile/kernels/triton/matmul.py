# mypy: ignore-errors
"""Main loops of the integer kernels: weights on M, pixels on N, int32 accumulators.

A linear layer is the convolution of images of one pixel, so both kernels share everything here.
"""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.weights import unpack_int4


@triton.jit
def tile_order(tiles_m: tl.constexpr, tiles_n, GROUP: tl.constexpr):
    """(M tile, N tile) of this program: GROUP pixel tiles share the weight tiles they read while those are in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_m)
    first = group * GROUP
    width = tl.minimum(tiles_n - first, GROUP)
    within = pid % (GROUP * tiles_m)
    return within // width, first + within % width


@triton.jit
def split_range(STEPS: tl.constexpr, SPLIT_K: tl.constexpr):
    """First and last + 1 K step of this program."""
    if SPLIT_K == 1:
        # Plus the program index, which is 0: knowing the count, ptxas unrolls the whole loop of a small tile (50 kB of
        # code, up to 16 s of compilation). That it is positive may be known, it saves the case of no step at all.
        first, last = 0, STEPS + tl.program_id(2)
    else:
        per_split: tl.constexpr = (STEPS + SPLIT_K - 1) // SPLIT_K
        first = tl.minimum(tl.program_id(2) * per_split, STEPS)
        last = tl.minimum(first + per_split, STEPS)
    return first, last


@triton.jit
def tap_rows(
    origin, pad_ptr, h0, w0, tap, H: tl.constexpr, W: tl.constexpr, X_STRIDE: tl.constexpr, KW: tl.constexpr,
    DIL_H: tl.constexpr, DIL_W: tl.constexpr, UPSAMPLE: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Where channel 0 of the pixels that one tap reads lies, [BLOCK_N] pointers.

    Args:
        origin: [BLOCK_N] pointers to the image, without UPSAMPLE to its (maybe outside) pixel (h0, w0).
        h0, w0: int32 [BLOCK_N], top left input position of the output pixels.
        BORDER: the tap can leave the image; such pixels read `pad_ptr`.
    """
    down, right = tap // KW * DIL_H, tap % KW * DIL_W
    h, w = h0 + down, w0 + right
    offset = ((h >> 1) * W + (w >> 1)) * X_STRIDE if UPSAMPLE == 2 else (down * W + right) * X_STRIDE
    rows = origin + offset
    if BORDER:
        # Unsigned: what is negative is large. A constant row in place of a mask keeps the loads plain asynchronous copies.
        inside = (h.to(tl.uint32, bitcast=True) < H * UPSAMPLE) & (w.to(tl.uint32, bitcast=True) < W * UPSAMPLE)
        rows = tl.where(inside, rows, pad_ptr + tl.zeros_like(h))
    return rows


@triton.jit
def multiply(acc, w_ptrs, x, x_high, BITS: tl.constexpr, DOTS: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr):
    """One K step: `acc` plus weights times the activation tiles x (and x_high), [PART, BLOCK_N] each."""
    w = tl.load(w_ptrs)  # [BLOCK_M, PART]
    if BITS == 4:
        low, high = unpack_int4(w, ASM)
        acc = tl.dot(low, x, acc, out_dtype=tl.int32)
        acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        if DOTS == 2:
            acc = tl.dot(tl.load(w_ptrs + PART), x_high, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def accumulate(
    x_ptr, pad_ptr, w_ptr, rows, image, h0, w0, H: tl.constexpr, W: tl.constexpr, X_STRIDE: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, DIL_H: tl.constexpr, DIL_W: tl.constexpr, UPSAMPLE: tl.constexpr,
    KC: tl.constexpr, BITS: tl.constexpr, BORDER: tl.constexpr, GLU: tl.constexpr, GATE_ROWS: tl.constexpr,
    ASM: tl.constexpr, DOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """One flat loop over taps x channel blocks.

    Args:
        rows: int32 [BLOCK_M], weight rows.
        image, h0, w0: int32 [BLOCK_N], see `tap_rows`.
        GLU: also multiply the rows `GATE_ROWS` further on.
        DOTS: products per step. Two of half the depth need half the row pointers, and Triton's prefetch pass leaves
            them alone: what it carries over the iterations on sm_80, 86, 89 is taken apart into bytes by Triton 3.9.

    Returns:
        (acc, gate): int32 [BLOCK_M, BLOCK_N]; gate means nothing without GLU. 4-bit weights count 16-fold.
    """
    PART: tl.constexpr = BLOCK_K // DOTS
    BLOCKS: tl.constexpr = KC // BLOCK_K
    STEP_BYTES: tl.constexpr = BLOCK_K * BITS // 8
    ROW_BYTES: tl.constexpr = KH * KW * KC * BITS // 8
    tl.static_assert(BITS == 8 or DOTS == 2, "the two nibbles of a byte are two products")
    k = tl.arange(0, PART)
    w_ptrs = w_ptr + rows[:, None] * ROW_BYTES + k[None, :]  # [BLOCK_M, PART]
    origin = x_ptr + image.to(tl.int64) * (H * W * X_STRIDE)
    if UPSAMPLE == 1:
        origin += (h0 * W + w0) * X_STRIDE
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    gate = acc
    first, last = split_range(KH * KW * BLOCKS, SPLIT_K)
    for step in range(first, last):
        tap = step // BLOCKS
        pixels = tap_rows(origin, pad_ptr, h0, w0, tap, H, W, X_STRIDE, KW, DIL_H, DIL_W, UPSAMPLE, BORDER)
        x_ptrs = pixels[None, :] + (step % BLOCKS * BLOCK_K + k)[:, None]  # [PART, BLOCK_N]
        # The compiler does not see through the choice of pointers; without this the loads are of single bytes.
        x_ptrs = tl.max_contiguous(tl.multiple_of(x_ptrs, (16, 1)), (PART, 1))
        x = tl.load(x_ptrs)
        x_high = tl.load(x_ptrs + PART) if DOTS == 2 else x
        acc = multiply(acc, w_ptrs + step * STEP_BYTES, x, x_high, BITS, DOTS, PART, ASM)
        if GLU:
            gate_ptrs = w_ptrs + GATE_ROWS * ROW_BYTES + step * STEP_BYTES
            gate = multiply(gate, gate_ptrs, x, x_high, BITS, DOTS, PART, ASM)
    return acc, gate


@triton.jit
def partial_plane(partial_ptr, split, index: tl.constexpr, rows, pixel, plane, pixels_pad, ACCUMULATORS: tl.constexpr):
    """Pointers [BLOCK_M, BLOCK_N] into plane `index` of a split; a plane has `plane` values, its rows `pixels_pad`."""
    start = (split * ACCUMULATORS + index) * plane
    return partial_ptr + start + rows[:, None] * pixels_pad + pixel[None, :]


@triton.jit
def sum_partials(
    acc, partial_ptr, index: tl.constexpr, rows, pixel, plane, pixels_pad, ACCUMULATORS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Accumulator `index` of all splits added; exact, so the order in which they arrived does not matter."""
    total = tl.zeros_like(acc)
    for split in range(SPLIT_K):
        source = partial_plane(partial_ptr, split, index, rows, pixel, plane, pixels_pad, ACCUMULATORS)
        # .cg: other multiprocessors wrote this, the first-level cache must not answer.
        total += tl.load(source, cache_modifier=".cg")
    return total


@triton.jit
def exchange_partials(
    acc, gate, acc2, gate2, partial_ptr, counter_ptr, rows, pixel, pixels_pad, O_PAD: tl.constexpr,
    SEGMENTS: tl.constexpr, GLU: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Split-K without a second launch: everyone writes its int32 sums, the last one adds them up.

    Args:
        acc, gate, acc2, gate2: int32 [BLOCK_M, BLOCK_N] sums of this split; unused ones are ignored.
        partial_ptr: int32 [SPLIT_K, SEGMENTS * (2 if GLU else 1), O_PAD, pixels_pad].

    Returns:
        (last, acc, gate, acc2, gate2): the sums are complete where `last`; the counter is zero again.
    """
    PER_SEGMENT: tl.constexpr = 2 if GLU else 1
    COUNT: tl.constexpr = SEGMENTS * PER_SEGMENT
    plane = O_PAD * pixels_pad.to(tl.int64)
    split = tl.program_id(2)
    tl.store(partial_plane(partial_ptr, split, 0, rows, pixel, plane, pixels_pad, COUNT), acc)
    if GLU:
        tl.store(partial_plane(partial_ptr, split, 1, rows, pixel, plane, pixels_pad, COUNT), gate)
    if SEGMENTS == 2:
        tl.store(partial_plane(partial_ptr, split, PER_SEGMENT, rows, pixel, plane, pixels_pad, COUNT), acc2)
        if GLU:
            tl.store(partial_plane(partial_ptr, split, 3, rows, pixel, plane, pixels_pad, COUNT), gate2)
    tl.debug_barrier()  # all threads' partials are written before the release below
    counter = counter_ptr + tl.program_id(0)
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        tl.store(counter, 0)
        acc = sum_partials(acc, partial_ptr, 0, rows, pixel, plane, pixels_pad, COUNT, SPLIT_K)
        if GLU:
            gate = sum_partials(gate, partial_ptr, 1, rows, pixel, plane, pixels_pad, COUNT, SPLIT_K)
        if SEGMENTS == 2:
            acc2 = sum_partials(acc2, partial_ptr, PER_SEGMENT, rows, pixel, plane, pixels_pad, COUNT, SPLIT_K)
            if GLU:
                gate2 = sum_partials(gate2, partial_ptr, 3, rows, pixel, plane, pixels_pad, COUNT, SPLIT_K)
    return last, acc, gate, acc2, gate2
