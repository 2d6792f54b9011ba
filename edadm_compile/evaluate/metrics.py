"""Error measures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum ref² / sum (value - ref)²)`` in dB; inf when equal."""
    signal = float(reference.double().square().sum())
    noise = float((value.double() - reference.double()).square().sum())
    return decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; inf without noise, -inf without signal or with infinite noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and not math.isinf(noise) else -math.inf


def finite(value: Any) -> Any:
    """Plain values without infinities, which JSON does not have: an exact match is None. NaN stays."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def psnr(reference: Tensor, value: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, float64 [N].

    Args:
        reference, value: [N, ...], clamped to half the data range around zero before comparison.
    """
    limit = data_range / 2
    difference = value.double().clamp(-limit, limit) - reference.double().clamp(-limit, limit)
    mse = difference.square().flatten(1).mean(dim=1)
    return 10 * torch.log10(data_range**2 / mse.clamp(min=1e-20))


def frechet(features_a: Tensor, features_b: Tensor, eps: float = 1e-6) -> float:
    """Fréchet distance of two Gaussians fitted to features [N, d] (Heusel et al., arXiv 1706.08500).

    The trace of the root of the covariance product comes from symmetric eigenvalues, and `eps` on the diagonals
    keeps singular covariances (dead features) well defined.
    """
    a, b = features_a.double(), features_b.double()
    identity = eps * torch.eye(a.shape[1], dtype=torch.float64)
    cov_a, cov_b = torch.cov(a.T) + identity, torch.cov(b.T) + identity
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * cross)


def kernel_distance(features_a: Tensor, features_b: Tensor, *, paired: bool = False) -> tuple[float, float]:
    """Kernel distance (KID): unbiased squared MMD under ``k(x, y) = (x·y / d + 1)^3`` (Bińkowski et al., arXiv 1801.01401).

    Computed once over all samples, not as a mean over subsets. Being unbiased, it can be negative by chance.

    Args:
        features_a, features_b: [N, d] and [M, d].
        paired: row i of both comes from the same noise. Pairs (i, i) of the cross term are then left out (Gretton et
            al., JMLR 13, 2012, equation 4), without which dependent samples would look closer than they are; equal sets
            are at 0 exactly.

    Returns:
        the distance and its standard error: the first term of the variance of U-statistics (Hoeffding, 1948), from the
        scatter of each sample's share of the distance. It comes out too large where both distributions are equal.

    Raises:
        ValueError: fewer than 2 rows, or paired sets of different length.
    """
    a, b = features_a.double(), features_b.double()
    n, m = len(a), len(b)
    if min(n, m) < 2 or (paired and n != m):
        raise ValueError(f"kernel distance of {n} and {m} samples (paired: {paired})")
    within_a = (_kernel_sums(a, a) - _kernel(a, a)) / (n - 1)
    within_b = (_kernel_sums(b, b) - _kernel(b, b)) / (m - 1)
    if paired:
        across = (_kernel_sums(a, b) + _kernel_sums(b, a) - 2 * _kernel(a, b)) / (n - 1)
        share = within_a + within_b - across
        return float(share.mean()), 2 * float((share.var() / n).sqrt())
    share_a, share_b = within_a - _kernel_sums(a, b) / m, within_b - _kernel_sums(b, a) / n
    return float(share_a.mean() + share_b.mean()), 2 * float((share_a.var() / n + share_b.var() / m).sqrt())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """The kernel of corresponding rows of [N, d] and [N, d], float64 [N]."""
    return ((a * b).sum(dim=1) / a.shape[1] + 1) ** 3


def _kernel_sums(a: Tensor, b: Tensor, block: int = 1024) -> Tensor:
    """Sums of the kernel of each row of `a` and all rows of `b`, [N]; in blocks, so that no [N, M] matrix is held."""
    parts = [sum(((x @ y.T / a.shape[1] + 1) ** 3).sum(dim=1) for y in b.split(block)) for x in a.split(block)]
    return torch.cat([part for part in parts if isinstance(part, Tensor)])


def inception_score(logits: Tensor) -> float:
    """Inception score ``exp(E KL(p(y|x) || p(y)))`` of logits [N, classes] (Salimans et al., arXiv 1606.03498), one split."""
    log_p = torch.log_softmax(logits.double(), dim=1)
    marginal = log_p.exp().mean(dim=0, keepdim=True).clamp(min=1e-300)
    return float((log_p.exp() * (log_p - marginal.log())).sum(dim=1).mean().exp())
