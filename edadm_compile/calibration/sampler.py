"""Run a noise predictor through a diffusers scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edadm_compile.calibration import guidance
from edadm_compile.calibration.schedulers import (
    make_scheduler,
    read_scheduler,
    schedule_length,
    step_options,
    step_output,
    timesteps,
)
from edadm_compile.errors import InputError
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature

__all__ = [
    "Denoiser", "Hook", "draw_conditions", "draw_noise", "make_scheduler", "read_scheduler", "sample", "schedule_length",
    "timesteps",
]  # fmt: skip

#: (x [B, ...], t [B], *conditions) -> prediction [B, ...]: noise, v or x0, whichever the scheduler expects
Denoiser = Callable[..., Tensor]
#: Called as hook(index of the call, t, x, prediction) after each call of the model, with all its rows: under guidance
#: [2B, ...], first those without condition (`guidance.both_branches` gives the conditions of these rows).
Hook = Callable[[int, float, Tensor, Tensor], None]


def draw_noise(signature: Signature, n: int, generator: torch.Generator) -> Tensor:
    """Standard normal x_T, float32 [n, C, H, W]."""
    return torch.randn((n, *signature.inputs[0].shape), generator=generator)


def draw_conditions(
    signature: Signature,
    n: int,
    generator: torch.Generator,
    pool: dict[str, Tensor] | None = None,
    null: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    """Conditions for `n` trajectories: rows of the user's pool (the same rows for all), else random labels.

    Args:
        null: as in `SamplerSpec`; its label is none of the classes and is not drawn.

    Raises:
        InputError: a condition is neither in the pool nor an integer label with a known number of classes.
    """
    pool = pool or {}
    rows: dict[int, Tensor] = {}
    specs = signature.conditions
    nulls = tuple(null) or (None,) * len(specs)
    return [_draw_condition(s, n, generator, pool, rows, k) for s, k in zip(specs, nulls, strict=True)]


def _draw_condition(
    spec: InputSpec,
    n: int,
    generator: torch.Generator,
    pool: dict[str, Tensor],
    rows: dict[int, Tensor],
    null: Tensor | None,
) -> Tensor:
    if spec.name in pool:
        length = pool[spec.name].shape[0]
        if length not in rows:  # tensors of one length are rows of one table: keep them together
            rows[length] = torch.randint(0, length, (n,), generator=generator)
        return pool[spec.name][rows[length]].to(spec.dtype)
    if spec.num_classes is not None:
        # Every class equally often, in random order.
        labels = guidance.labels_in_turn(n, spec.num_classes, null)
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
    """Denoise `x` with the scheduler, as the pipelines of diffusers do.

    Under guidance the model is called with a doubled batch. Schedulers keep state between steps (the history of a
    multistep method, the phase of a step that takes two calls): each call of this function has its own.

    Args:
        x: float32 [B, C, H, W], noise at the scheduler's initial sigma of 1 (scaled here).
        conditions: [B, ...] each.
        hook: sees the input and output of every call of the model.
        stop_after: number of calls of the model, default all; a step takes one or more, as `timesteps` lists them.

    Returns:
        float32 [B, C, H, W].

    Raises:
        InputError: a scheduler that cannot be used, or a prediction that is not of the shape of x.
    """
    scheduler = make_scheduler(spec)
    extra = step_options(scheduler, spec, generator)
    inputs = guidance.both_branches(spec, conditions)
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps[:stop_after]):
            x_in = guidance.doubled(spec, scheduler.scale_model_input(x, t))
            batch_t = torch.full((x_in.shape[0],), float(t)).to(scheduler.timesteps.dtype)
            prediction = model(x_in, batch_t, *inputs)
            if hook is not None:
                hook(index, float(t), x_in, prediction)
            output = step_output(scheduler, guidance.combine(spec, prediction, x.shape[1]), x)
            x = scheduler.step(output, t, x, **extra).prev_sample
    return x
