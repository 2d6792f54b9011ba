"""Time-step density and diversity aware calibration (TDAC), arXiv 2401.04585 section 3.2.

Gram-matrix form: with X the flattened features of each step and U the same after normalising every spatial
position along channels, all pairwise distances and cosine similarities come from X Xᵀ and U Uᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.config import TdacConfig
from edadm_compile.errors import CalibrationError

_ROUNDING = 1e-12  # relative; float64 leaves about 1e-16 times the square root of the feature's size


@dataclass(frozen=True)
class Allocation:
    """Samples per sampler step (step 0 is the noisiest).

    Attributes:
        counts: int64 [T], sums to the number of samples.
        density, diversity: float64 [T] in [0, 1], the two scores (zeros when degenerate).
        radius: the density radius used.
    """

    counts: Tensor
    density: Tensor
    diversity: Tensor
    radius: float


def score(features: list[Tensor], config: TdacConfig) -> tuple[Tensor, Tensor, float]:
    """Density and diversity of each step's bottleneck feature.

    density: the number of other steps within the radius; diversity: the summed cosine distance to all other steps.
    Both are scaled to [0, 1] over the steps.

    Args:
        features: T float tensors [B, C, h, w] of one batch of trajectories.

    Returns:
        (density float64 [T], diversity float64 [T], radius).

    Raises:
        CalibrationError: a feature is not finite.
    """
    for index, feature in enumerate(features):
        if not bool(torch.isfinite(feature).all()):
            raise CalibrationError(
                f"bottleneck feature at sampler step {index} is not finite; check the model and its scheduler"
            )
    flat = torch.stack([f.reshape(-1).double() for f in features])
    unit = torch.stack([_unit(f).reshape(-1) for f in features])
    count, size = flat.shape
    gram = flat @ flat.T
    norms = gram.diagonal()
    sums = norms[:, None] + norms[None, :]
    apart = sums - 2 * gram
    # What the cancellation leaves of two equal features differs from pair to pair and from one BLAS to the next; a
    # radius must not fall among these.
    distance = torch.where(apart > _ROUNDING * sums, apart, 0) / size
    positions = features[0].numel() // features[0].shape[1]
    cosine = (positions - unit @ unit.T).clamp(min=0)
    off = ~torch.eye(count, dtype=torch.bool)
    radius = config.radius
    if radius is None:
        radius = float(torch.quantile(distance[off], config.radius_quantile)) if count > 1 else 0.0
    neighbours = ((distance <= radius) & off).sum(dim=1).double()
    return _unit_range(neighbours), _unit_range((cosine * off).sum(dim=1)), radius


def _unit(feature: Tensor) -> Tensor:
    return torch.nn.functional.normalize(feature.double(), dim=1)


def _unit_range(values: Tensor) -> Tensor:
    """Scale to [0, 1]; equal values (one step, a radius that takes all or none) carry no information: zeros."""
    low, high = values.min(), values.max()
    if float(high - low) <= 1e-12 * max(1.0, float(high.abs())):
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def allocate(weights: Tensor, samples: int, min_per_step: int = 1) -> Tensor:
    """Distribute samples over steps in proportion to `weights` by largest remainders.

    Every step gets `min_per_step` when there are enough samples; weights that are all zero mean uniform.

    Args:
        weights: float64 [T], >= 0.

    Returns:
        int64 [T], non-negative, summing to `samples`.
    """
    steps = weights.numel()
    floor = min_per_step if samples >= min_per_step * steps else 0
    rest = samples - floor * steps
    total = float(weights.sum())
    share = weights / total if total > 0 else torch.full_like(weights, 1 / steps)
    exact = share * rest
    counts = exact.floor().long()
    missing = rest - int(counts.sum())
    # Ties go to the earlier (noisier) step: a stable sort keeps the result reproducible.
    order = torch.argsort(exact - counts, descending=True, stable=True)
    counts[order[:missing]] += 1
    return counts + floor


def tdac(features: list[Tensor], samples: int, config: TdacConfig) -> Allocation:
    """Allocate `samples` over the steps whose features are given.

    Raises:
        CalibrationError: features are not finite.
    """
    density, diversity, radius = score(features, config)
    weights = density + config.diversity_weight * diversity
    return Allocation(allocate(weights, samples, config.min_per_step), density, diversity, radius)


def uniform(steps: int, samples: int) -> Allocation:
    """The same number of samples for every step, remainders spread evenly over the trajectory."""
    marks = torch.arange(steps + 1, dtype=torch.float64) * samples / steps
    counts = torch.round(marks).long().diff()
    zeros = torch.zeros(steps, dtype=torch.float64)
    return Allocation(counts, zeros, zeros, 0.0)


#: PTQ4DM (arXiv 2211.15736): timesteps around this share of the schedule, with this spread, are taken most often.
_CENTRE, _SPREAD = 0.4, 0.4


def normal(t: Tensor, samples: int) -> Allocation:
    """Samples in proportion to a normal density over the timesteps, leaning towards the less noisy half.

    Args:
        t: timestep of each step [T].
    """
    times = t.double()
    share = (times - times.min()) / (times.max() - times.min()).clamp(min=1e-12)
    weights = torch.exp(-0.5 * ((share - _CENTRE) / _SPREAD).square())
    zeros = torch.zeros_like(weights)
    return Allocation(allocate(weights, samples, 0), zeros, zeros, 0.0)


def choose(selection: str, features: list[Tensor], t: Tensor, samples: int, config: TdacConfig) -> Allocation:
    """The allocation that a method asks for.

    Args:
        selection: one of `edadm_compile.methods.SELECTIONS`.
        features, t: of each sampler step.

    Raises:
        CalibrationError: features are not finite.
    """
    if selection == "uniform":
        return uniform(len(features), samples)
    if selection == "normal":
        return normal(t, samples)
    if selection == "tdac":
        return tdac(features, samples, config)
    density, diversity, radius = score(features, config)
    weights = density if selection == "density" else diversity
    return Allocation(allocate(weights, samples, config.min_per_step), density, diversity, radius)
