"""Structural similarity (SSIM) of Wang, Bovik, Sheikh and Simoncelli, IEEE TIP 13(4), 2004."""

from __future__ import annotations

import torch
from torch import Tensor

#: Settings of the paper: Gaussian window of 11 x 11 with a standard deviation of 1.5 pixels, K1 and K2.
WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def window_for(height: int, width: int) -> int:
    """Side of the window: 11, on smaller images the largest odd number that fits."""
    smallest = min(height, width, WINDOW)
    return smallest if smallest % 2 else smallest - 1


def ssim(reference: Tensor, value: Tensor, data_range: float = 2.0) -> Tensor:
    """SSIM of each image, float64 [N]; 1 for equal images.

    ``(2 mu_x mu_y + C1)(2 sigma_xy + C2) / ((mu_x² + mu_y² + C1)(sigma_x² + sigma_y² + C2))`` with ``C = (K L)²``,
    means and (co)variances under a normalized Gaussian window, averaged over the positions where the window lies
    within the image, and over channels.

    Args:
        reference, value: [N, C, H, W], clamped to half the data range around zero before comparison.
        data_range: L, distance of the largest from the smallest value.
    """
    limit = data_range / 2
    x, y = (v.double().clamp(-limit, limit) for v in (reference, value))
    size = window_for(*x.shape[2:])
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def mean(image: Tensor) -> Tensor:
        """Windowed mean, [N, C, H, W] to [N, C, H - size + 1, W - size + 1]; the Gaussian is separable."""
        return image.unfold(3, size, 1).matmul(weights).unfold(2, size, 1).matmul(weights)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2
    covariance = mean(x * y) - mu_x * mu_y
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    above = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    below = (mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2)
    return (above / below).flatten(1).mean(dim=1)
