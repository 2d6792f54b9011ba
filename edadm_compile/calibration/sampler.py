"""Run a noise predictor through a diffusers scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature

#: (x [B, ...], t [B], *conditions) -> predicted noise [B, ...]
Denoiser = Callable[..., Tensor]
#: Called as hook(step index, t, x, prediction) after each model evaluation.
Hook = Callable[[int, float, Tensor, Tensor], None]


def make_scheduler(spec: SamplerSpec) -> Any:
    """A diffusers scheduler with its timesteps set.

    Raises:
        InputError: unknown class, or settings the class refuses.
    """
    import diffusers  # heavy; only needed when something is sampled

    config = dict(spec.scheduler)
    name = str(config.pop("_class_name", ""))
    cls = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if cls is None:
        raise InputError(
            f"scheduler: got _class_name {name!r}, allowed is a scheduler class of diffusers such as DDIMScheduler, DDPMScheduler, "
            "PNDMScheduler or DPMSolverMultistepScheduler (scheduler.config in Python lacks the name: add it, or use save_config)"
        )
    try:
        scheduler = cls.from_config(config)
        length = int(scheduler.config.num_train_timesteps)
        if not 1 <= spec.steps <= length:
            raise InputError(f"steps: got {spec.steps}, allowed 1 to {length} (num_train_timesteps of the scheduler)")
        scheduler.set_timesteps(spec.steps)
    except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
        raise InputError(f"scheduler {name} refuses its configuration: {error}") from error
    return scheduler


def read_scheduler(path: Path) -> dict[str, Any]:
    """Read a diffusers ``scheduler_config.json``.

    Raises:
        InputError: missing, malformed, or without ``_class_name``.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot read scheduler file {path}: {error.strerror}") from None
    except ValueError as error:
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


def predicted_noise(prediction: Tensor, channels: int) -> Tensor:
    """The noise part of a prediction: models with learned variance return twice the channels."""
    return prediction[:, :channels] if prediction.shape[1] == 2 * channels else prediction


def draw_noise(signature: Signature, n: int, generator: torch.Generator) -> Tensor:
    """Standard normal x_T, float32 [n, C, H, W]."""
    return torch.randn((n, *signature.inputs[0].shape), generator=generator)


def draw_conditions(
    signature: Signature, n: int, generator: torch.Generator, pool: dict[str, Tensor] | None = None
) -> list[Tensor]:
    """Conditions for `n` trajectories: rows of the user's pool (the same rows for all), else random labels.

    Raises:
        InputError: a condition is neither in the pool nor an integer label with a known number of classes.
    """
    pool = pool or {}
    rows: dict[int, Tensor] = {}
    return [_draw_condition(spec, n, generator, pool, rows) for spec in signature.conditions]


def _draw_condition(
    spec: InputSpec, n: int, generator: torch.Generator, pool: dict[str, Tensor], rows: dict[int, Tensor]
) -> Tensor:
    if spec.name in pool:
        length = pool[spec.name].shape[0]
        if length not in rows:  # tensors of one length are rows of one table: keep them together
            rows[length] = torch.randint(0, length, (n,), generator=generator)
        return pool[spec.name][rows[length]].to(spec.dtype)
    if spec.num_classes is not None:
        # Every class equally often, in random order.
        labels = torch.arange(n) % spec.num_classes
        return labels[torch.randperm(n, generator=generator)].to(spec.dtype)
    raise InputError(
        f"condition {spec.name!r} cannot be drawn at random; give values with --cond FILE.safetensors holding a tensor "
        f"{spec.name!r} [{', '.join(['N', *map(str, spec.shape)])}]"
    )


def sample(
    model: Denoiser,
    spec: SamplerSpec,
    x: Tensor,
    conditions: Sequence[Tensor] = (),
    *,
    generator: torch.Generator | None = None,
    hook: Hook | None = None,
    stop_after: int | None = None,
) -> Tensor:
    """Denoise `x` with the scheduler.

    Args:
        x: float32 [B, C, H, W], noise at the scheduler's initial sigma of 1 (scaled here).
        hook: sees every step's model input and output.
        stop_after: number of steps to run, default all.

    Returns:
        float32 [B, C, H, W].
    """
    scheduler = make_scheduler(spec)
    extra = {"eta": spec.eta} if "eta" in scheduler.step.__code__.co_varnames and spec.eta else {}
    if "generator" in scheduler.step.__code__.co_varnames:
        extra["generator"] = generator  # type: ignore[assignment]
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps[:stop_after]):
            x_in = scheduler.scale_model_input(x, t)
            batch_t = torch.full((x.shape[0],), float(t)).to(scheduler.timesteps.dtype)
            prediction = model(x_in, batch_t, *conditions)
            if hook is not None:
                hook(index, float(t), x_in, prediction)
            noise = predicted_noise(prediction, x.shape[1])
            if noise.shape != x.shape:
                raise InputError(
                    f"the model predicts {list(prediction.shape)} for x {list(x.shape)}; expected noise of the shape of x"
                )
            x = scheduler.step(noise, t, x, **extra).prev_sample
    return x
