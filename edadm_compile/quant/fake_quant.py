"""Trainable simulated quantizers: the modules of the fake_quant dialect.

`ActFakeQuant` learns its step size (LSQ, arXiv 1902.08153, on log(scale) so that one learning rate fits all
layers) and drops quantization at random while training (QDrop, arXiv 2203.05740). `WeightFakeQuant` learns which
way each weight rounds (AdaRound, arXiv 2004.10568).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edadm_compile.quant.affine import dequantize, per_channel, quantize, weight_codes
from edadm_compile.quant.soft_rounding import GAMMA, ZETA, SoftRounding
from edadm_compile.quant.spec import QuantSpec


def _round_ste(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


class ActFakeQuant(nn.Module):
    """Simulated quantization of an activation.

    State: `log_scale` and `zero_point` (float32, integer values): [1], or a shape that broadcasts along the channels.
    Until `set_affine` is called, or while `enabled` is False, forward returns its input.
    """

    zero_point: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False
        self.drop: MaskPool | None = None
        self.log_scale = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1))

    def set_affine(self, scale: Tensor, zero_point: Tensor) -> None:
        """Install a scale and zero point ([1], or [C, 1, 1] for images) and switch quantization on."""
        self.log_scale.data = scale.float().log()
        self.zero_point = zero_point.float()
        self.enabled = True

    @property
    def scale(self) -> Tensor:
        """The step size, float32."""
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x` (any float shape); random elements pass unquantized while training with QDrop."""
        if not self.enabled:
            return x
        scale = self.scale
        if not torch.is_grad_enabled():
            return dequantize(
                quantize(x, scale, self.zero_point, self.spec.qmin, self.spec.qmax), scale, self.zero_point
            )
        codes = torch.clamp(_round_ste(x / scale) + self.zero_point, self.spec.qmin, self.spec.qmax)
        x_fq = dequantize(codes, scale, self.zero_point)
        return x_fq if self.drop is None else torch.where(self.drop.take(x.shape), x, x_fq)


class WeightFakeQuant(nn.Module):
    """Per-output-channel simulated quantization of a weight, with optional learned rounding.

    State: `scale` [channels] float32; `alpha`, shape of the weight, while rounding is learned; `codes`, int8,
    once it is fixed.
    """

    scale: Tensor

    def __init__(self, spec: QuantSpec, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = False
        self.alpha: nn.Parameter | None = None
        self.codes: Tensor | None = None
        self.register_buffer("scale", torch.ones(channels))

    def set_scale(self, scale: Tensor) -> None:
        """Install per-channel scales [channels] and switch quantization (round to nearest) on."""
        self.scale = scale.float()
        self.enabled = True

    def start_rounding(self, weight: Tensor) -> nn.Parameter:
        """Create alpha so that the soft weight starts at the float weight; returns it for the optimizer."""
        rest = weight / self._s(weight)
        rest = (rest - torch.floor(rest)).clamp(0.01, 0.99)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))
        return self.alpha

    def soft_rounding(self) -> Tensor:
        """h(alpha) in [0, 1], the fraction by which each weight is rounded up."""
        assert self.alpha is not None
        return torch.clamp(torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)

    def finish_rounding(self, weight: Tensor) -> None:
        """Fix each code to floor or ceil by the sign of alpha and drop alpha."""
        assert self.alpha is not None
        up = (self.alpha.detach() >= 0).float()
        codes = torch.floor(weight / self._s(weight)) + up
        self.codes = torch.clamp(codes, self.spec.qmin, self.spec.qmax).to(torch.int8)
        self.alpha = None

    def integer_codes(self, weight: Tensor) -> Tensor:
        """int8 codes: the learned ones, else round to nearest."""
        return self.codes if self.codes is not None else weight_codes(weight, self.scale, self.spec)

    def forward(self, weight: Tensor) -> Tensor:
        """Simulated quantized weight, shape and dtype of `weight`."""
        if not self.enabled:
            return weight
        s = self._s(weight)
        if self.alpha is None:
            return self.integer_codes(weight).to(weight.dtype) * s
        soft: Tensor = SoftRounding.apply(weight, s, self.alpha, self.spec.qmin, self.spec.qmax)  # type: ignore[no-untyped-call]
        return soft

    def _s(self, weight: Tensor) -> Tensor:
        return per_channel(self.scale, weight.dim(), self.spec.axis)


class MaskPool:
    """Random boolean masks cut from one pre-drawn pool (drawing a fresh mask costs as much as a convolution).

    Args:
        probability: chance that an element is dropped (True in the mask).
        generator: source of randomness; the pool and all offsets come from it.
        size: pool length; masks longer than it wrap around.
    """

    def __init__(self, probability: float, generator: torch.Generator, size: int = 1 << 20) -> None:
        self._pool = torch.rand(size, generator=generator) < probability
        self._generator = generator

    def take(self, shape: torch.Size) -> Tensor:
        """A boolean mask of `shape`."""
        n = shape.numel()
        pool = self._pool
        if n >= pool.numel():
            pool = pool.repeat(n // pool.numel() + 2)
        start = int(torch.randint(0, pool.numel() - n, (1,), generator=self._generator))
        return pool[start : start + n].view(shape)
