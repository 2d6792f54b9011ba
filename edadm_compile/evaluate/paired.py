"""Sample two models from the same noise, in batches, and keep what a comparison needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration.sampler import Denoiser, Hook, sample
from edadm_compile.evaluate.compare import NoiseComparison, NoiseErrors, asking
from edadm_compile.ir.program import SamplerSpec

#: Set apart from the seeds of a compilation, which are below 1e12 for configured seeds up to 1e6.
_EVALUATION = 7_000_000_000_000


@dataclass(frozen=True)
class Pairs:
    """Images of two models from the same noise, and their noise predictions along the reference's trajectories.

    Attributes:
        reference, candidate: float32 [N, C, H, W] as the scheduler returns them, not clamped.
        noise: error of the candidate's predictions.
        timesteps: one for each entry of `noise.per_step`.
    """

    reference: Tensor
    candidate: Tensor
    noise: NoiseComparison
    timesteps: tuple[float, ...]


def evaluation_seed(seed: int) -> int:
    """Seed of evaluation noise: never one from which a compilation drew (`passes.base.Context.generator`)."""
    return _EVALUATION + seed


def sample_pairs(
    reference: Denoiser,
    candidate: Denoiser,
    spec: SamplerSpec,
    x: Tensor,
    conditions: Sequence[Tensor],
    *,
    batch: int,
    seed: int,
    advance: Callable[[int, str], None] = lambda steps, message: None,
) -> Pairs:
    """Sample both models from `x` with the same conditions and the same scheduler noise.

    The reference's trajectory is walked once: its images and the candidate's predictions on its states come from it.

    Args:
        x: noise float32 [N, C, H, W].
        conditions: tensors [N, ...].
        batch: images at a time.
        seed: of the scheduler's noise, where it adds any.
        advance: told each sampler step of each model.
    """
    errors = NoiseErrors()
    images: tuple[list[Tensor], list[Tensor]] = ([], [])
    for number, rows in enumerate(torch.arange(len(x)).split(batch)):
        given = [c[rows] for c in conditions]
        ask = asking(candidate, spec, given, errors)

        def first(index: int, t: float, x_in: Tensor, prediction: Tensor, ask: Hook = ask) -> None:
            ask(index, t, x_in, prediction)
            advance(1, "float trajectories")

        def second(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
            advance(1, "quantized trajectories")

        for model, hook, found in ((reference, first, images[0]), (candidate, second, images[1])):
            generator = torch.Generator().manual_seed(seed + number)
            found.append(sample(model, spec, x[rows], given, generator=generator, hook=hook).float())
    return Pairs(torch.cat(images[0]), torch.cat(images[1]), errors.result(), tuple(errors.timesteps))
