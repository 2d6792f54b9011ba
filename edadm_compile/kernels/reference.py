"""The meaning of every ``edadm::`` operator, in torch on the CPU.

Integer products accumulate exactly in int32. The epilogue is ``float(acc) * multiplier[n] + bias[n]`` in float32.
16-bit codes are executed as two int8 terms: ``float(acc_hi) * (256 * multiplier) + (float(acc_lo) * multiplier + bias)``.
Padding has the code `pad_value`, the one that means zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from edadm_compile.ir.schemas import LIBRARY
from edadm_compile.quant import affine, packing
from edadm_compile.quant.spec import act_spec


@cache
def _int_mm_is_exact() -> bool:
    """Whether torch._int_mm adds exactly here: byte kernels for old processors saturate in 16 bits on the way."""
    try:
        a = torch.full((16, 256), -128, dtype=torch.int8)
        b = torch.full((256, 16), 127, dtype=torch.int8)
        return bool(
            (torch._int_mm(a, b) == -128 * 127 * 256).all() and (torch._int_mm(-b.T, b) == -127 * 127 * 256).all()
        )
    except RuntimeError:
        return False


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of int8 [M, K] and int8 [N, K] (transposed), int32 [M, N]."""
    if a.shape[1] == 1:  # torch._int_mm returns uninitialised memory for K = 1 (seen with torch 2.13)
        return a.to(torch.int32) * b.T.to(torch.int32)
    if _int_mm_is_exact():
        return torch._int_mm(a, b.T)
    return (a.double() @ b.double().T).to(torch.int32)  # exact: |acc| < 2^31 < 2^53


def terms(x_q: Tensor) -> list[Tensor]:
    """The int8 terms of activation codes, most significant first."""
    return list(affine.split_hi_lo(x_q)) if x_q.dtype == torch.int16 else [x_q]


def epilogue(accumulators: Sequence[Tensor], multiplier: Tensor, bias: Tensor) -> Tensor:
    """int32 accumulators [..., N], one per term, to float32 [..., N]."""
    result = accumulators[-1].float() * multiplier + bias
    if len(accumulators) == 2:
        result = accumulators[0].float() * (multiplier * 256) + result
    return result


def patches(
    x_q: Tensor,
    kernel: Sequence[int],
    pad_value: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """im2col in storage order.

    Args:
        x_q: int8 [B, C, H, W].
        padding: [h, w], or [top, bottom, left, right].

    Returns:
        int8 [B, H', W', kh * kw, C].
    """
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    x = torch.nn.functional.pad(x_q, (left, right, top, bottom), value=pad_value).permute(0, 2, 3, 1)
    size = [(x.shape[1 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    taps = []
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            h, w = r * dilation[0], s * dilation[1]
            taps.append(
                x[
                    :,
                    h : h + (size[0] - 1) * stride[0] + 1 : stride[0],
                    w : w + (size[1] - 1) * stride[1] + 1 : stride[1],
                ]
            )
    return torch.stack(taps, dim=3)


def conv_accumulators(
    x_q: Tensor, matrix: Tensor, kernel: Sequence[int], pad_value: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> list[Tensor]:  # fmt: skip
    """int32 [B, H', W', O] accumulators of a convolution, one per int8 term of `x_q`.

    Args:
        matrix: int8 [O, K], K ordered (kh, kw, channels of a group).
    """
    results = []
    for term in terms(x_q):
        columns = patches(term, kernel, pad_value, stride, padding, dilation)
        batch, height, width, taps, channels = columns.shape
        per_group = channels // groups
        rows = columns.reshape(-1, taps, groups, per_group)
        outputs = [
            int_matmul(rows[:, :, g].reshape(-1, taps * per_group).contiguous(), m)
            for g, m in enumerate(matrix.chunk(groups))
        ]
        results.append(torch.cat(outputs, dim=1).reshape(batch, height, width, -1))
    return results


def transposed_settings(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Padding [top, bottom, left, right] of the stride-1 convolution that a transposed one is, after zero insertion."""
    sides: list[int] = []
    for i in range(2):
        base = dilation[i] * (kernel[i] - 1) - padding[i]
        sides += [base, base + output_padding[i]]
    return sides


def insert_zeros(x_q: Tensor, stride: Sequence[int], pad_value: int) -> Tensor:
    """Spread [B, C, H, W] codes `stride` apart, the gaps filled with the code of zero."""
    b, c, h, w = x_q.shape
    spread = x_q.new_full((b, c, (h - 1) * stride[0] + 1, (w - 1) * stride[1] + 1), pad_value)
    spread[:, :, :: stride[0], :: stride[1]] = x_q
    return spread


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    spec = act_spec(bits, symmetric)
    return affine.quantize(x, scale, zero_point, spec.qmin, spec.qmax).to(spec.dtype)


def _dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return affine.dequantize(x_q.float(), scale, zero_point)


def _dequantize_weight(w_q: Tensor, scale: Tensor, bits: int, shape: Sequence[int], axis: int) -> Tensor:
    codes = packing.unpack(w_q, bits, shape).float()
    weight = codes * affine.per_channel(scale, codes.dim(), 0)
    return weight.transpose(0, 1).contiguous() if axis == 1 else weight


def _qconv2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    matrix = packing.unpack_matrix(w_q, bits, math.prod(shape[1:]))
    acc = conv_accumulators(x_q, matrix, shape[2:], pad_value, stride, padding, dilation, groups)
    return epilogue(acc, multiplier, bias).permute(0, 3, 1, 2).contiguous()


def _qconv_transpose2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    acc = transpose_accumulators(x_q, w_q, pad_value, stride, padding, output_padding, dilation, groups, bits, shape)
    return epilogue(acc, multiplier, bias).permute(0, 3, 1, 2).contiguous()


def transpose_accumulators(
    x_q: Tensor, w_q: Tensor, pad_value: int, stride: Sequence[int], padding: Sequence[int],
    output_padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int, shape: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """int32 accumulators of a transposed convolution: zero insertion, then a convolution with the flipped kernel."""
    flipped = packing.to_matrix(packing.unpack(w_q, bits, shape).flip(2, 3))
    sides = transposed_settings(shape[2:], stride, padding, output_padding, dilation)
    spread = insert_zeros(x_q, stride, pad_value)
    return conv_accumulators(spread, flipped, shape[2:], pad_value, (1, 1), sides, dilation, groups)


def linear_accumulators(x_q: Tensor, w_q: Tensor, bits: int, shape: Sequence[int]) -> list[Tensor]:
    """int32 [..., O] accumulators of a linear layer, one per int8 term."""
    matrix = packing.unpack_matrix(w_q, bits, shape[1])
    return [
        int_matmul(term.reshape(-1, shape[1]).contiguous(), matrix).reshape(*x_q.shape[:-1], shape[0])
        for term in terms(x_q)
    ]


def _qlinear(x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    return epilogue(linear_accumulators(x_q, w_q, bits, shape), multiplier, bias)


def matmul_accumulator(a_q: Tensor, b_q: Tensor, zero_a: int, zero_b: int) -> Tensor:
    """int32 [..., M, N] sum over k of (a - zero_a)(b - zero_b), exact (computed in float64, far below 2^53)."""
    return ((a_q.double() - zero_a) @ (b_q.double() - zero_b)).to(torch.int32)


def _qmatmul(a_q: Tensor, b_q: Tensor, scale: Tensor, zero_a: int, zero_b: int) -> Tensor:
    return matmul_accumulator(a_q, b_q, zero_a, zero_b).float() * scale


for _name, _kernel in (
    ("quantize", _quantize), ("dequantize", _dequantize), ("dequantize_weight", _dequantize_weight),
    ("qconv2d", _qconv2d), ("qconv_transpose2d", _qconv_transpose2d), ("qlinear", _qlinear), ("qmatmul", _qmatmul),
):  # fmt: skip
    LIBRARY.impl(_name, _kernel, "CPU")
