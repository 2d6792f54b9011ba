"""The soft weight of AdaRound (arXiv 2004.10568) as one differentiable function, computed piece by piece.

    w_soft = clamp(floor(w / s) + h(alpha), qmin, qmax) * s,   h = clamp(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1)

Written with torch's own operators, a training step keeps eight intermediates of the weight's size for the backward
pass and moves each through main memory. Here nothing is kept but the operands, and each piece stays in the cache. Every
element goes through the same operations in the same order: values and gradients are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

#: AdaRound's stretch of the sigmoid beyond [0, 1], so that h reaches 0 and 1 exactly.
GAMMA, ZETA = -0.1, 1.1
#: Elements of a piece: a few buffers of this size fit into the second-level cache.
_PIECE = 1 << 16


class SoftRounding(torch.autograd.Function):
    """``apply(weight, scale, alpha, qmin, qmax)``; only alpha has a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, alpha: Tensor, qmin: int, qmax: int) -> Tensor:
        """The soft weight.

        Args:
            weight: float32, dimension 0 is cut into pieces.
            scale: float32, broadcasts to `weight`, with as many dimensions.
            alpha: float32, shape of `weight`.
        """
        ctx.save_for_backward(weight, scale, alpha)
        ctx.limits = qmin, qmax
        result = torch.empty_like(weight)
        for w, s, a, out in _pieces(weight, scale, alpha, result):
            up = torch.sigmoid(a).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0.0, 1.0)
            torch.div(w, s, out=out)
            out.floor_().add_(up).clamp_(qmin, qmax).mul_(s)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, None, None]:
        """Zero where either clamp holds, else ``g s (zeta - gamma) sigmoid'``."""
        weight, scale, alpha = ctx.saved_tensors
        qmin, qmax = ctx.limits
        result = torch.empty_like(alpha)
        for w, s, a, g, out in _pieces(weight, scale, alpha, gradients[0], result):
            sigmoid = torch.sigmoid(a)
            stretched = sigmoid.mul(ZETA - GAMMA).add_(GAMMA)
            soft = torch.div(w, s).floor_().add_(stretched.clamp(0.0, 1.0))
            free = (soft >= qmin) & (soft <= qmax) & (stretched >= 0.0) & (stretched <= 1.0)
            grown = torch.where(free, g * s, 0.0).mul_(ZETA - GAMMA)
            out.copy_(torch.ops.aten.sigmoid_backward(grown, sigmoid))
        return None, None, result, None, None


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors along dimension 0; those of length 1 there broadcast."""
    rows = tensors[0].shape[0]
    step = max(1, _PIECE * rows // max(1, tensors[0].numel()))
    for start in range(0, rows, step):
        yield tuple(v if v.shape[0] == 1 != rows else v[start : start + step] for v in tensors)
