"""Error measures."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum ref² / sum (value - ref)²)`` in dB; inf when equal."""
    signal = float(reference.double().square().sum())
    noise = float((value.double() - reference.double()).square().sum())
    return decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``; inf without noise, -inf without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


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
