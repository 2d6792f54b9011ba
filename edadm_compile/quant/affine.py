"""The affine map between real values and codes; the one definition of rounding in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_compile.quant.spec import QuantSpec


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Codes ``clamp(round_half_even(x / scale) + zero_point, qmin, qmax)`` as float values.

    Args:
        x: float32, any shape.
        scale: float32, broadcastable to `x`, > 0.
        zero_point: float32 or integer, broadcastable to `x`.

    Returns:
        float32 tensor of integer values, shape of `x`.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values ``(codes - zero_point) * scale``, float32."""
    return (codes - zero_point) * scale


def per_channel(values: Tensor, ndim: int, axis: int | None) -> Tensor:
    """Reshape a 1-D per-channel tensor so that it broadcasts along `axis` of an `ndim`-D tensor."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def weight_codes(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Round-to-nearest integer codes of a weight.

    Args:
        weight: float32 [..., channels at `spec.axis`, ...].
        scale: float32 [channels].

    Returns:
        int8, shape of `weight`.
    """
    s = per_channel(scale, weight.dim(), spec.axis)
    return torch.clamp(torch.round(weight / s), spec.qmin, spec.qmax).to(torch.int8)


def split_hi_lo(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Split int16 codes into int8 terms with ``codes == 256 * hi + lo`` exactly.

    ``lo`` is centred in [-128, 127], so that both terms are signed bytes and feed the same integer kernel.

    Args:
        codes: int16 in [-32768, 32639] (`act_spec(16)`).

    Returns:
        (hi, lo), both int8, shape of `codes`.
    """
    wide = codes.to(torch.int32)
    hi = torch.div(wide + 128, 256, rounding_mode="floor")
    return hi.to(torch.int8), (wide - 256 * hi).to(torch.int8)
