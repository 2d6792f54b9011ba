"""Compare two noise predictors from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration.guidance import both_branches, combine
from edadm_compile.calibration.sampler import Denoiser, Hook, sample
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


class NoiseErrors:
    """Running sums over trajectories of signal and error energy, by sampler step."""

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self._signal: list[float] = []
        self._error: list[float] = []
        self._branches = [[0.0, 0.0], [0.0, 0.0]]  # signal and error without and with the condition
        self._guided = False

    def add(self, index: int, t: float, prediction: Tensor, other: Tensor) -> None:
        """Count the predictions of step `index`; steps come in order."""
        if index == len(self.timesteps):
            self.timesteps.append(t)
            self._signal.append(0.0)
            self._error.append(0.0)
        signal, error = _squares(prediction, other)
        self._signal[index] += signal
        self._error[index] += error

    def add_branches(self, prediction: Tensor, other: Tensor) -> None:
        """Count the predictions of a doubled batch by branch."""
        self._guided = True
        for sums, *pair in zip(self._branches, prediction.chunk(2), other.chunk(2), strict=True):
            sums[:] = [old + new for old, new in zip(sums, _squares(*pair), strict=True)]

    def result(self) -> NoiseComparison:
        """The comparison in dB."""
        signal, error = self._signal, self._error
        per_step = tuple(decibel(s, e) for s, e in zip(signal, error, strict=True))
        whole = decibel(sum(signal), sum(error))
        early = decibel(sum(signal[:-1]), sum(error[:-1])) if len(signal) > 1 else whole
        without, with_condition = self._branches
        branches = (decibel(*without), decibel(*with_condition)) if self._guided else None
        return NoiseComparison(whole, early, per_step, branches)


def _squares(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """Sums of squares of the reference and of the difference to it."""
    return float(reference.double().square().sum()), float((other.double() - reference.double()).square().sum())


def asking(candidate: Denoiser, spec: SamplerSpec, conditions: Sequence[Tensor], errors: NoiseErrors) -> Hook:
    """A hook that asks `candidate` about every state of a trajectory of the reference and counts its error.

    Under guidance states and predictions are those of the doubled batch; what counts is the guided prediction.
    """
    inputs = both_branches(spec, conditions)

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        batch_t = torch.full((x_in.shape[0],), t, dtype=torch.float64).to(torch.int64 if t == int(t) else torch.float32)
        other = candidate(x_in, batch_t, *inputs)
        errors.add(index, t, *(combine(spec, value, x_in.shape[1]) for value in (prediction, other)))
        if spec.guided:
            errors.add_branches(prediction, other)

    return hook


def compare_noise(
    reference: Denoiser, candidate: Denoiser, spec: SamplerSpec, x: Tensor, conditions: Sequence[Tensor], seed: int = 0
) -> NoiseComparison:
    """Feed both models the states of the reference's own trajectories and compare their predictions.

    Args:
        x: fresh noise float32 [B, C, H, W].
    """
    errors = NoiseErrors()
    hook = asking(candidate, spec, conditions, errors)
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
