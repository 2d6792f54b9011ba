"""diffusers schedulers: which are supported, how they are made, what their steps are given."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.texts import read_text

#: Classes whose loop is the one in `sampler.sample`; tests compare each with a plain diffusers loop.
SUPPORTED = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "LCMScheduler",
)  # fmt: skip
#: No setting of a schedule is larger, and no list of one longer (timesteps, betas).
LARGEST_NUMBER = 100_000
#: What constructors and first steps raise of settings that make no sense.
_REFUSALS = (
    TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError, AssertionError, MemoryError,
)  # fmt: skip
_LEARNED = ("learned", "learned_range")


def make_scheduler(spec: SamplerSpec) -> Any:
    """A diffusers scheduler with its timesteps set.

    Raises:
        InputError: a class that is not supported, or settings the class refuses.
    """
    import diffusers  # heavy; only needed when something is sampled

    config = dict(spec.scheduler)
    name = str(config.pop("_class_name", ""))
    if name not in SUPPORTED:
        raise InputError(
            f"scheduler: got _class_name {name!r}, supported are {', '.join(SUPPORTED)} "
            "(scheduler.config in Python lacks the name: add it, or use save_config)"
        )
    cls = getattr(diffusers, name)
    _check_sizes(config)
    try:
        scheduler = cls.from_config(config)
        length = int(scheduler.config.num_train_timesteps)
        if not 1 <= spec.steps <= length:
            raise InputError(f"steps: got {spec.steps}, allowed 1 to {length} (num_train_timesteps of the scheduler)")
        if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps and spec.steps < 4:
            raise InputError(f'steps: got {spec.steps}, PNDMScheduler needs 4 or more, or "skip_prk_steps": true')
        scheduler.set_timesteps(spec.steps)
        _check(scheduler, spec, name, length)
        _try_step(cls.from_config(config), spec)
    except _REFUSALS as error:
        raise InputError(f"scheduler {name} refuses its configuration: {error}") from error
    return scheduler


def _check_sizes(config: dict[str, Any]) -> None:
    """Refuse numbers that would be lists of that length, or loops.

    Raises:
        InputError: naming the entry.
    """
    for name, value in config.items():
        numbers = value if isinstance(value, list) else [value]
        plain = isinstance(value, (str, int, float, list, type(None))) and len(numbers) <= LARGEST_NUMBER
        if not plain or any(isinstance(n, (list, dict)) for n in numbers):
            raise InputError(
                f"scheduler: {str(name)[:80]} is a {type(value).__name__}, expected a number, a text or a list"
            )
        counts = [n for n in numbers if isinstance(n, (int, float)) and math.isfinite(n)]  # bounds may be infinite
        if any(abs(n) > LARGEST_NUMBER for n in counts):
            raise InputError(f"scheduler: {str(name)[:80]} is {str(value)[:40]}, allowed up to {LARGEST_NUMBER}")


def _try_step(scheduler: Any, spec: SamplerSpec) -> None:
    """One step of one number: several settings, such as the prediction type, are read there and not before."""
    scheduler.set_timesteps(spec.steps)
    t, x = scheduler.timesteps[0], torch.zeros(1, 1, 1, 1)
    scheduler.scale_model_input(x, t)
    channels = 2 if _learns_variance(scheduler) else 1
    options = step_options(scheduler, spec, torch.Generator())
    scheduler.step(torch.zeros(1, channels, 1, 1), t, x, **options)


def _check(scheduler: Any, spec: SamplerSpec, name: str, length: int) -> None:
    """Refuse here what a step would fail on, or silently leave out."""
    last = float(scheduler.timesteps.max())
    if last > length - 1:
        raise InputError(
            f"scheduler {name}: its timesteps with {spec.steps} steps reach {last:g}, the schedule ends at {length - 1}; "
            'take fewer steps, or set "steps_offset" to 0'
        )
    if spec.eta and not _takes(scheduler, "eta"):
        raise InputError(f"eta: got {spec.eta:g}, {name} has no such setting (DDIMScheduler does)")
    if not 0 <= spec.eta <= 1:
        raise InputError(f"eta: got {spec.eta:g}, allowed 0 (no noise is added) to 1")
    if not (math.isfinite(spec.guidance) and spec.guidance >= 0):
        raise InputError(f"guidance: got {spec.guidance:g}, allowed is a finite scale of 0 or more; 1 is no guidance")


def _learns_variance(scheduler: Any) -> bool:
    return type(scheduler).__name__ == "DDPMScheduler" and scheduler.config.variance_type in _LEARNED


def _takes(scheduler: Any, name: str) -> bool:
    return name in inspect.signature(scheduler.step).parameters


def step_options(scheduler: Any, spec: SamplerSpec, generator: torch.Generator | None) -> dict[str, Any]:
    """Keyword arguments of ``scheduler.step``: eta where it is not 0, the generator where noise is drawn."""
    extra: dict[str, Any] = {"eta": spec.eta} if spec.eta else {}
    return {**extra, "generator": generator} if _takes(scheduler, "generator") else extra


def step_output(scheduler: Any, prediction: Tensor, x: Tensor) -> Tensor:
    """What ``scheduler.step`` is given of a prediction [B, C or 2C, ...] for `x` [B, C, ...].

    Models with learned variance return twice the channels. DDPM with ``variance_type`` "learned" or "learned_range"
    reads the second half, all others get the first alone.

    Raises:
        InputError: any other shape, or a learned variance that the model does not predict.
    """
    channels = x.shape[1]
    both = prediction.dim() == x.dim() and prediction.shape[1] == 2 * channels
    mean = prediction[:, :channels] if both else prediction
    if mean.shape != x.shape:
        raise InputError(
            f"the model predicts {list(prediction.shape)} for x {list(x.shape)}; expected a prediction of the shape of x"
        )
    if not _learns_variance(scheduler):
        return mean
    if not both:
        raise InputError(
            f"scheduler DDPMScheduler: variance_type {scheduler.config.variance_type!r} needs a model that predicts "
            f'{2 * channels} channels, this one predicts {channels}; use "fixed_small"'
        )
    return prediction


def read_scheduler(path: Path) -> dict[str, Any]:
    """Read a diffusers ``scheduler_config.json``.

    Raises:
        InputError: missing, malformed, or without ``_class_name``.
    """
    try:
        config = json.loads(read_text(path))
    except OSError as error:
        raise InputError(f"cannot read scheduler file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"scheduler file {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or "_class_name" not in config:
        raise InputError(f"scheduler file {path} has no _class_name; expected a diffusers scheduler_config.json")
    return config


def timesteps(spec: SamplerSpec) -> list[float]:
    """Timesteps the model is called with, in sampling order (noisiest first), one per scheduler step."""
    return [float(t) for t in make_scheduler(spec).timesteps]


def schedule_length(spec: SamplerSpec) -> int:
    """Number of training timesteps of the schedule."""
    return int(make_scheduler(spec).config.num_train_timesteps)


def fractional_timestep(spec: SamplerSpec) -> float | None:
    """The first timestep of the sampler that is not whole; None when all are."""
    return next((t for t in timesteps(spec) if not t.is_integer()), None)
