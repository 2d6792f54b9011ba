# mypy: ignore-errors
"""The int8 peak of an sm_90 GPU: matrix products on operands that never leave shared memory or registers.

No kernel that has to load its operands can be faster, so this is the ceiling that others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from edadm_compile.kernels.gluon.layouts import accumulator_layout, copy_layout, fragment_layout, operand_layout

#: Codes along K in one step: four instructions.
DEPTH = 128
#: (BLOCK_M, BLOCK_N, warps, programs per multiprocessor, whether weights come from registers).
SHAPES = ((128, 128, 4, 2, False), (128, 128, 4, 2, True), (64, 256, 4, 2, False), (128, 256, 8, 1, False))


@gluon.jit
def resident_products(
    a_ptr, b_ptr, out_ptr, loops, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DEPTH: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """`loops` times int8 [BLOCK_M, DEPTH] x [BLOCK_N, DEPTH]ᵀ into the same accumulators; stores them."""
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = copy_layout(DEPTH, WARPS)
    shared: gl.constexpr = operand_layout(DEPTH)
    rows_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    rows_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    k = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, layout))
    a = gl.allocate_shared_memory(gl.int8, [BLOCK_M, DEPTH], shared)
    b = gl.allocate_shared_memory(gl.int8, [BLOCK_N, DEPTH], shared)
    a.store(gl.load(a_ptr + rows_m[:, None] * DEPTH + k[None, :]))
    b.store(gl.load(b_ptr + rows_n[:, None] * DEPTH + k[None, :]))
    fence_async_shared()
    gl.thread_barrier()
    accumulators: gl.constexpr = accumulator_layout(BLOCK_N, WARPS)
    acc = gl.zeros([BLOCK_M, BLOCK_N], gl.int32, accumulators)
    left = a
    if REGISTERS:
        left = a.load(fragment_layout(BLOCK_N, WARPS))
    for _ in range(loops):
        acc = warpgroup_mma(left, b.permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    acc = warpgroup_mma_wait(0, deps=[acc])
    out_m = gl.program_id(0) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, accumulators))
    out_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, accumulators))
    gl.store(out_ptr + out_m[:, None] * BLOCK_N + out_n[None, :], acc)


def calls(device: torch.device, loops: int = 2000) -> dict[str, tuple[Callable[[], object], float]]:
    """By name: a launch that fills the GPU, checked once, and the operations it does."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    found = {}
    for block_m, block_n, warps, each, registers in SHAPES:
        a, b = (torch.randint(-128, 128, (n, DEPTH), device=device).to(torch.int8) for n in (block_m, block_n))
        grid = multiprocessors * each
        out = torch.zeros(grid, block_m, block_n, dtype=torch.int32, device=device)

        def run(count, a=a, b=b, out=out, grid=grid, shape=(block_m, block_n), warps=warps, registers=registers):
            resident_products[(grid,)](a, b, out, count, *shape, DEPTH, registers, num_warps=warps)

        run(3)
        if not torch.equal(out[grid - 1].double(), 3 * (a.double() @ b.double().T)):
            raise AssertionError(f"resident products of {block_m} x {block_n} are wrong")
        name = f"resident products {block_m}x{block_n}, weights in {'registers' if registers else 'shared memory'}"
        found[name] = (lambda run=run: run(loops), 2.0 * grid * block_m * block_n * DEPTH * loops)
    return found
