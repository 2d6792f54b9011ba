"""Weight scales that make room for what ONNX Runtime's integer convolution keeps in its int32 bias.

Its bias counts in units of ``s_x s_w``, the worth of one product of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edadm_compile.export.operators.codes import common_output
from edadm_compile.export.scope import Scope
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.quantizers import QUANTIZE

#: Largest bias code; a channel whose bias needs more gets a coarser weight scale.
_BIAS_LIMIT = 2**30
#: Units of more than this many output codes are made finer: half of one is what the bias is wrong by.
_COARSE = 0.25
#: Largest weight code.
_CODE_LIMIT = 127


def output_channels(s: Scope, node: fx.Node, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight scales and bias of a convolution whose output codes have a scale s_n and a zero point z_n per channel.

    The integer convolution knows one output scale s and one zero point (0): ``s_w'[n] = s_w[n] s / s_n`` and
    ``b'[n] = (b[n] + s_n z_n) s / s_n`` give the same codes.
    """
    reader = next(iter(node.users))
    if op_name(reader.target) != QUANTIZE:
        return scale, bias
    channel_scale, channel_zero = (s.constant_of(a) for a in reader.args[1:3])
    assert channel_scale is not None and channel_zero is not None
    if channel_scale.numel() == 1:
        return scale, bias
    common, _ = common_output(channel_scale)
    factor = (common / channel_scale).reshape(-1)
    shift = (channel_scale * channel_zero).reshape(-1)
    return scale * factor, (shift if bias is None else bias + shift) * factor


def fine_units(s: Scope, node: fx.Node, codes: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor]:
    """Weight codes times k with weight scales divided by k: the same weights, and units k times finer.

    With codes of two or three bits a sum has few values, each worth many output codes, and a bias that is rounded to one
    of them is wrong by as many. A channel of zeros may have any scale: its k is free.

    Args:
        codes: int8 [O, ...].
        scale: float32 [O], after `output_channels`.

    Returns:
        (k as int32 [O, 1, ...], or None where the codes stay; scales).
    """
    reader = next(iter(node.users))
    if op_name(reader.target) != QUANTIZE:
        return None, scale
    x_scale, out_scale = s.constant_of(node.args[0].args[1]), s.constant_of(reader.args[1])  # type: ignore[union-attr]
    assert x_scale is not None and out_scale is not None
    common = out_scale if out_scale.numel() == 1 else common_output(out_scale)[0]
    wanted = torch.log2(x_scale.double() * scale.double() / (common.double() * _COARSE)).ceil().clamp(min=0)
    largest = codes.abs().reshape(codes.shape[0], -1).amax(dim=1).double()
    power = torch.minimum(wanted, torch.log2(_CODE_LIMIT / largest).floor())  # any for a channel of zeros
    finer = (scale.double() / 2**power).float()
    k = (2 ** power.where(largest > 0, torch.zeros_like(power))).to(torch.int32)
    return (k.reshape(-1, *[1] * (codes.dim() - 1)) if bool((k > 1).any()) else None), finer


def room_for_bias(codes: Tensor, scale: Tensor, bias: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Coarser weights for channels whose bias is beyond int32 in units of ``s_x * s_w`` (weights that hardly matter)."""
    least = (bias.double().abs() / (x_scale.double() * _BIAS_LIMIT)).float()
    if not bool((least > scale).any()):
        return codes, scale
    wider = torch.maximum(scale, least)
    factor = (scale / wider).reshape(-1, *[1] * (codes.dim() - 1))
    return torch.round(codes.float() * factor).to(torch.int8), wider
