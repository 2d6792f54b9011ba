"""Compare two noise predictors from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration.sampler import Denoiser, sample
from edadm_compile.evaluate.metrics import decibel, psnr
from edadm_compile.ir.program import SamplerSpec


@dataclass(frozen=True)
class NoiseComparison:
    """Noise-prediction error over float trajectories.

    Attributes:
        sqnr: over all steps together, dB.
        sqnr_without_last: the same without the last step, which alone can hold most of the error.
        per_step: dB for each sampler step, noisiest first.
    """

    sqnr: float
    sqnr_without_last: float
    per_step: tuple[float, ...]

    @property
    def worst(self) -> float:
        """Lowest step, dB."""
        return min(self.per_step)


def compare_noise(
    reference: Denoiser, candidate: Denoiser, spec: SamplerSpec, x: Tensor, conditions: Sequence[Tensor], seed: int = 0
) -> NoiseComparison:
    """Feed both models the states of the reference's own trajectories and compare their predictions.

    Args:
        x: fresh noise float32 [B, C, H, W].
    """
    signal: list[float] = []
    noise: list[float] = []

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        batch_t = torch.full((x_in.shape[0],), t, dtype=torch.float64).to(torch.int64 if t == int(t) else torch.float32)
        other = candidate(x_in, batch_t, *conditions)
        signal.append(float(prediction.double().square().sum()))
        noise.append(float((other.double() - prediction.double()).square().sum()))

    sample(reference, spec, x, conditions, generator=torch.Generator().manual_seed(seed), hook=hook)
    per_step = tuple(decibel(s, n) for s, n in zip(signal, noise, strict=True))
    whole = decibel(sum(signal), sum(noise))
    return NoiseComparison(whole, decibel(sum(signal[:-1]), sum(noise[:-1])) if len(signal) > 1 else whole, per_step)


def compare_images(
    reference: Denoiser, candidate: Denoiser, spec: SamplerSpec, x: Tensor, conditions: Sequence[Tensor], seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample both models from the same noise (and the same scheduler noise).

    Returns:
        (reference images, candidate images, PSNR float64 [B]).
    """
    images = [
        sample(model, spec, x, conditions, generator=torch.Generator().manual_seed(seed))
        for model in (reference, candidate)
    ]
    return images[0], images[1], psnr(images[0], images[1])
