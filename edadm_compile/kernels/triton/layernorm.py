# mypy: ignore-errors
"""LayerNorm and quantization: every program normalises BLOCK_R rows held in registers."""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.overlap import begin
from edadm_compile.kernels.triton.rounding import inverse_root, to_codes


@triton.jit
def layernorm(
    x_ptr, weight_ptr, bias_ptr, post_ptr, out_ptr, out_q_ptr,
    rows,
    C: tl.constexpr, X_STRIDE: tl.constexpr, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUT: tl.constexpr, OUT_STRIDE: tl.constexpr, OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_R, C]; mean, then the centred second moment; see `edadm_compile.kernels.layernorm`."""
    begin(OVERLAP)
    tl.static_assert(BLOCK_C >= C, "a row must fit in a block")
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < C)[None, :]
    start = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + start * X_STRIDE + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / C  # [BLOCK_R]
    centred = x - mean[:, None]
    if BLOCK_C != C:
        centred = tl.where((channel < C)[None, :], centred, 0.0)
    variance = tl.sum(centred * centred, axis=1) / C
    v = centred * inverse_root(variance + EPS, EXACT)[:, None]  # [BLOCK_R, BLOCK_C]
    if HAS_WEIGHT:
        v *= tl.load(weight_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if HAS_BIAS:
        v += tl.load(bias_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if OUT:
        tl.store(out_ptr + start * OUT_STRIDE + channel[None, :], v.to(out_ptr.dtype.element_ty), mask=inside)
    if OUT_Q:
        scale, zero, inverse = tl.load(post_ptr), tl.load(post_ptr + 1), tl.load(post_ptr + 2)
        code = to_codes(v, scale, zero, inverse, QMIN, QMAX, EXACT, ASM)
        tl.store(out_q_ptr + start * OUT_Q_STRIDE + channel[None, :], code, mask=inside)
