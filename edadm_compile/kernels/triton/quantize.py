# mypy: ignore-errors
"""Elementwise activation and quantization of a strided tensor."""

import triton
import triton.language as tl

from edadm_compile.kernels.triton.overlap import begin
from edadm_compile.kernels.triton.rounding import activate, to_codes, wide_codes


@triton.jit
def quantize(
    x_ptr, post_ptr, out_ptr, out_q_ptr, out_q_lo_ptr,
    batch,
    X_BATCH: tl.constexpr, X_PIXEL: tl.constexpr, X_CHANNEL: tl.constexpr, HW: tl.constexpr, C: tl.constexpr,
    ACT: tl.constexpr, OUT: tl.constexpr, OUT_STRIDE: tl.constexpr,
    OUT_Q: tl.constexpr, OUT_Q_STRIDE: tl.constexpr, TERMS: tl.constexpr,
    QMIN: tl.constexpr, QMAX: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_P pixels and BLOCK_C channels of one image; see `edadm_compile.kernels.quantize`."""
    begin(OVERLAP)
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]  # [BLOCK_P, 1]
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    inside = (pixel < HW) & (channel < C)
    x_ptr += image * X_BATCH
    x = tl.load(x_ptr + pixel * X_PIXEL + channel * X_CHANNEL, mask=inside, other=0.0)
    v = activate(x.to(tl.float32), ACT, EXACT, ASM)  # [BLOCK_P, BLOCK_C]
    if OUT:
        out_ptr += image * (HW * OUT_STRIDE)
        tl.store(out_ptr + pixel * OUT_STRIDE + channel, v.to(out_ptr.dtype.element_ty), mask=inside)
    if OUT_Q:
        scale, zero, inverse = tl.load(post_ptr), tl.load(post_ptr + 1), tl.load(post_ptr + 2)
        offset = image * (HW * OUT_Q_STRIDE) + pixel * OUT_Q_STRIDE + channel
        row = (pixel < HW) & (channel < OUT_Q_STRIDE)  # the padding channels are written as 0
        if TERMS == 2:
            code = wide_codes(v, scale, zero, inverse, QMIN, QMAX, EXACT)
            if OUT_Q_STRIDE > C:
                code = tl.where(channel < C, code, 0)
            high = (code + 128) >> 8
            tl.store(out_q_ptr + offset, high.to(tl.int8), mask=row)
            tl.store(out_q_lo_ptr + offset, (code - 256 * high).to(tl.int8), mask=row)
        else:
            code = to_codes(v, scale, zero, inverse, QMIN, QMAX, EXACT, ASM)
            if OUT_Q_STRIDE > C:
                code = tl.where(channel < C, code, 0)
            tl.store(out_q_ptr + offset, code, mask=row)
