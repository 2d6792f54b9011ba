"""Range search: which real interval the codes should cover."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_compile.quant.spec import QuantSpec

#: Smallest scale handed out: below it, x / scale would overflow for ordinary x.
MIN_SCALE = 1e-12
#: Elements of a piece of a weight in the search; below torch's grain size, so that sums have one order.
_PIECE = 1 << 14


def affine_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose codes cover [low, high] widened to include 0.

    Zero is always representable exactly, because padding and pruned channels mean exactly zero.

    Args:
        low, high: float tensors of one shape.

    Returns:
        (scale float32, zero_point float32 with integer values), shape of `low`.
    """
    low = low.clamp(max=0.0)
    high = high.clamp(min=0.0)
    if spec.symmetric:
        # Codes reach -qmin on the negative side: int4 [-8, 7] covers -8 s .. 7 s.
        scale = torch.maximum(high / spec.qmax, low / spec.qmin).clamp(min=MIN_SCALE)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=MIN_SCALE)
    zero_point = torch.clamp(torch.round(spec.qmin - low / scale), spec.qmin, spec.qmax)
    return scale, zero_point


def search_activation(
    sample: Tensor, low: float, high: float, spec: QuantSpec, *, grid: int = 16, power: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Per-tensor scale and zero point with the smallest mean |error|^power on `sample`.

    Two-stage grid over shrink factors of both ends: a coarse `grid` x `grid` search over (0, 1], then a fine one
    around the best. One-sided tensors (softmax, ReLU) only search the end that exists. Candidates are evaluated
    in chunks so that memory stays near ``64 * sample.numel()`` floats.

    Args:
        sample: float32 [n], values drawn from the tensor.
        low, high: true minimum and maximum of the tensor.

    Returns:
        (scale [1], zero_point [1]), float32.
    """
    ends = (min(low, 0.0), max(high, 0.0))
    shrink = torch.arange(1, grid + 1, dtype=torch.float32) / grid
    best, least = (1.0, 1.0), float("inf")
    chosen = affine_from_range(torch.tensor([ends[0]]), torch.tensor([ends[1]]), spec)
    step = 1.0 / grid
    for stage in range(2):
        lo_f = shrink if stage == 0 else _around(best[0], step, grid)
        hi_f = shrink if stage == 0 else _around(best[1], step, grid)
        pairs = _pairs(lo_f, hi_f, ends, spec.symmetric)
        scale, zero = affine_from_range(pairs[:, 0] * ends[0], pairs[:, 1] * ends[1], spec)
        errors = torch.cat(
            [_error(sample, s, z, spec, power) for s, z in zip(scale.split(32), zero.split(32), strict=True)]
        )
        winner = int(torch.argmin(errors))
        if float(errors[winner]) < least:  # the fine grid need not contain the coarse winner
            best, least = (float(pairs[winner, 0]), float(pairs[winner, 1])), float(errors[winner])
            chosen = (scale[winner : winner + 1].clone(), zero[winner : winner + 1].clone())
    return chosen


def search_symmetric(
    sample: Tensor, low: float, high: float, spec: QuantSpec, *, candidates: int = 100, power: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Scale with the smallest mean |error|^power among 1..100 % of the extreme, zero point in the middle.

    Values of one sign use all codes: their zero point is the first or the last code. As EDA-DM's released quantizer,
    with its zero point pinned (a tie there picks one of two neighbours at random).

    Args:
        sample, low, high: as in `search_activation`.

    Returns:
        (scale [1], zero_point [1]), float32.
    """
    one_sided = low >= 0 or high <= 0
    codes = spec.qmax - spec.qmin if one_sided else spec.qmax
    zero = float(spec.qmin if low >= 0 else spec.qmax if high <= 0 else (spec.qmin + spec.qmax + 1) // 2)
    ends = max(high, -low) * torch.arange(1, candidates + 1, dtype=torch.float32) / candidates
    scale = (ends / codes).clamp(min=MIN_SCALE)
    zeros = torch.full_like(scale, zero)
    pairs = zip(scale.split(32), zeros.split(32), strict=True)
    winner = int(torch.argmin(torch.cat([_error(sample, s, z, spec, power) for s, z in pairs])))
    return scale[winner : winner + 1].clone(), zeros[:1].clone()


def search_outputs(
    sample: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, *, candidates: int = 16
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each channel with the least squared error among ranges shrunk at both ends alike.

    Args:
        sample: float32 [n, C], values of each channel.
        low, high: true minimum and maximum, [C].

    Returns:
        (scale, zero_point), float32 [C].
    """
    best = affine_from_range(low, high, spec)
    least = torch.full_like(low, float("inf"))
    for i in range(candidates):
        shrink = 1.0 - 0.6 * i / candidates
        scale, zero = affine_from_range(low * shrink, high * shrink, spec)
        codes = torch.clamp(torch.round(sample / scale) + zero, spec.qmin, spec.qmax)
        error = ((codes - zero) * scale - sample).square().sum(dim=0)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
    return best


def _around(center: float, step: float, grid: int) -> Tensor:
    fine = center + step * (torch.arange(grid, dtype=torch.float32) / (grid - 1) * 2 - 1)
    return fine.clamp(min=step / grid, max=1.0)


def _pairs(lo_f: Tensor, hi_f: Tensor, ends: tuple[float, float], symmetric: bool) -> Tensor:
    one = torch.ones(1)
    if symmetric:
        return torch.stack((hi_f, hi_f), dim=1)
    lo_f = lo_f if ends[0] < 0 else one
    hi_f = hi_f if ends[1] > 0 else one
    return torch.cartesian_prod(lo_f, hi_f)


def _error(sample: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, power: float) -> Tensor:
    s, z = scale[:, None], zero[:, None]
    codes = torch.clamp(torch.round(sample / s) + z, spec.qmin, spec.qmax)
    return _powered((codes - z) * s - sample, power).mean(dim=1)


def _powered(error: Tensor, power: float) -> Tensor:
    return error.square() if power == 2.0 else error.abs().pow(power)


def search_weight(weight: Tensor, spec: QuantSpec, *, candidates: int = 80, power: float = 2.0) -> Tensor:
    """Per-channel scales with the smallest sum of |rounding error|^power.

    Args:
        weight: float32, channels at `spec.axis`.

    Returns:
        scale float32 [channels]; channels of zeros get a scale that maps them to code 0.
    """
    rows = _rows(weight, spec)
    full = minmax_weight(weight, spec)
    step = max(1, _PIECE // max(1, rows.shape[1]))  # channels are independent: a piece of them stays in the cache
    pieces = zip(rows.split(step), full.split(step), strict=True)
    return torch.cat([_search_rows(r, f, spec, candidates, power) for r, f in pieces])


def _search_rows(rows: Tensor, full: Tensor, spec: QuantSpec, candidates: int, power: float) -> Tensor:
    """`search_weight` for the channels [n, K] with the min-max scales `full` [n]."""
    best_scale, best_error = full.clone(), torch.full_like(full, float("inf"))
    for i in range(candidates):
        scale = full * (1.0 - 0.8 * i / candidates)
        s = scale[:, None]
        rounded = torch.div(rows, s).round_().clamp_(spec.qmin, spec.qmax).mul_(s).sub_(rows)
        error = _powered(rounded, power).sum(dim=1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def minmax_weight(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Per-channel scales ``max|w| / qmax`` (the usual min-max rule), float32 [channels]."""
    absmax = _rows(weight, spec).abs().amax(dim=1)
    # An all-zero channel has no scale of its own; 1 keeps its codes 0 and its multiplier finite.
    return torch.where(absmax > 0, absmax / spec.qmax, torch.ones_like(absmax)).clamp(min=MIN_SCALE)


def _rows(weight: Tensor, spec: QuantSpec) -> Tensor:
    axis = spec.axis or 0
    return weight.movedim(axis, 0).reshape(weight.shape[axis], -1).float()
