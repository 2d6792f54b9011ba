"""Compare two noise predictors from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration.sampler import Denoiser, Hook, sample
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


class NoiseErrors:
    """Running sums over trajectories of signal and error energy, by sampler step."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self._signal: list[float] = []
        self._error: list[float] = []

    def add(self, index: int, t: float, prediction: Tensor, other: Tensor) -> None:
        """Count the predictions of step `index`; steps come in order."""
        if index == len(self.timesteps):
            self.timesteps.append(t)
            self._signal.append(0.0)
            self._error.append(0.0)
        self._signal[index] += float(prediction.double().square().sum())
        self._error[index] += float((other.double() - prediction.double()).square().sum())

    def result(self) -> NoiseComparison:
        """The comparison in dB."""
        signal, error = self._signal, self._error
        per_step = tuple(decibel(s, e) for s, e in zip(signal, error, strict=True))
        whole = decibel(sum(signal), sum(error))
        return NoiseComparison(
            whole, decibel(sum(signal[:-1]), sum(error[:-1])) if len(signal) > 1 else whole, per_step
        )


def asking(candidate: Denoiser, conditions: Sequence[Tensor], errors: NoiseErrors) -> Hook:
    """A hook that asks `candidate` about every state of a trajectory of the reference and counts its error."""

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        batch_t = torch.full((x_in.shape[0],), t, dtype=torch.float64).to(torch.int64 if t == int(t) else torch.float32)
        errors.add(index, t, prediction, candidate(x_in, batch_t, *conditions))

    return hook


def compare_noise(
    reference: Denoiser, candidate: Denoiser, spec: SamplerSpec, x: Tensor, conditions: Sequence[Tensor], seed: int = 0
) -> NoiseComparison:
    """Feed both models the states of the reference's own trajectories and compare their predictions.

    Args:
        x: fresh noise float32 [B, C, H, W].
    """
    errors = NoiseErrors()
    hook = asking(candidate, conditions, errors)
    sample(reference, spec, x, conditions, generator=torch.Generator().manual_seed(seed), hook=hook)
    return errors.result()


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
