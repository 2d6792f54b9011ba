"""Device code of the doubles."""

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    x_ptr, bias_ptr, out_ptr, rows, shift, COLS: tl.constexpr, GAIN: tl.constexpr,
    BIAS_STRIDE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (column < COLS) & (row < rows)
    value = tl.load(x_ptr + row * COLS + column, mask=mask).to(tl.float32) * GAIN + shift
    if bias_ptr is not None:
        value += tl.load(bias_ptr + row * BIAS_STRIDE + column, mask=mask)
    tl.store(out_ptr + row * COLS + column, value, mask=mask)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + kk[None, :])
        b = tl.load(b_ptr + n[:, None] * K + kk[None, :])
        acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def broken_kernel(x_ptr, bias_ptr, out_ptr, rows, shift, COLS: tl.constexpr, GAIN: tl.constexpr, BIAS_STRIDE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tl.store(out_ptr + tl.arange(0, 48), 0)


@triton.jit
def other_arguments_kernel(out_ptr, bias_ptr, x_ptr, rows, shift, COLS: tl.constexpr, GAIN: tl.constexpr, BIAS_STRIDE: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tl.store(out_ptr, 0)


@triton.jit
def n_major_kernel(
    a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        kk = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + kk[None, :])
        acc = tl.dot(a, tl.load(b_ptr + kk[:, None] * N + n[None, :]), acc, out_dtype=tl.int32)
    tl.store(out_ptr + m[:, None] * N + n[None, :], acc)
