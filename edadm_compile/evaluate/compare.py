"""Compare two noise predictors from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration.guidance import both_branches, combine
from edadm_compile.calibration.sampler import Denoiser, sample
from edadm_compile.evaluate.metrics import decibel, psnr
from edadm_compile.ir.program import SamplerSpec


@dataclass(frozen=True)
class NoiseComparison:
    """Noise-prediction error over float trajectories.

    Under guidance the prediction is the guided one, ``u + s (c - u)``: what the sampler steps with. Its error is up to
    2 s - 1 times that of a branch where the two branches round differently.

    Attributes:
        sqnr: over all steps together, dB.
        sqnr_without_last: the same without the last step, which alone can hold most of the error.
        per_step: dB for each sampler step, noisiest first.
        branches: dB over all steps of the prediction without and with the condition; None without guidance.
    """

    sqnr: float
    sqnr_without_last: float
    per_step: tuple[float, ...]
    branches: tuple[float, float] | None = None

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
    inputs = both_branches(spec, conditions)
    halves = [[0.0, 0.0], [0.0, 0.0]]  # signal and noise of each branch

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        batch_t = torch.full((x_in.shape[0],), t, dtype=torch.float64).to(torch.int64 if t == int(t) else torch.float32)
        other = candidate(x_in, batch_t, *inputs)
        used = [combine(spec, value, x.shape[1]) for value in (prediction, other)]
        for total, value in zip((signal, noise), _squares(*used), strict=True):
            total.append(value)
        if spec.guided:
            for sums, *pair in zip(halves, prediction.chunk(2), other.chunk(2), strict=True):
                sums[:] = [old + new for old, new in zip(sums, _squares(*pair), strict=True)]

    sample(reference, spec, x, conditions, generator=torch.Generator().manual_seed(seed), hook=hook)
    per_step = tuple(decibel(s, n) for s, n in zip(signal, noise, strict=True))
    whole = decibel(sum(signal), sum(noise))
    early = decibel(sum(signal[:-1]), sum(noise[:-1])) if len(signal) > 1 else whole
    branches = (decibel(*halves[0]), decibel(*halves[1])) if spec.guided else None
    return NoiseComparison(whole, early, per_step, branches)


def _squares(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Sums of squares of the reference and of the difference to it."""
    return float(reference.double().square().sum()), float((other.double() - reference.double()).square().sum())


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
