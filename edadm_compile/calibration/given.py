"""Calibration samples of the user's own, in place of those that are collected along the sampler's trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edadm_compile.calibration import guidance
from edadm_compile.calibration.dataset import CalibrationSet, Trajectories
from edadm_compile.calibration.tdac import Allocation
from edadm_compile.errors import InputError
from edadm_compile.ir.program import InputSpec, Program, SamplerSpec, Signature
from edadm_compile.ir.timesteps import as_timesteps


@dataclass(frozen=True)
class CalibrationSamples:
    """Inputs that a model is calibrated and reconstructed on.

    Attributes:
        x: noisy samples as the model gets them (scaled where the scheduler scales), floating [N, C, H, W].
        t: timesteps [N], at any places of the schedule.
        conditions: tensors [N, ...] by name of the model's forward parameter, for every condition. Under guidance those
            of the conditional branch; the other branch is added.
    """

    x: Tensor
    t: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def inputs(self, signature: Signature) -> list[Tensor]:
        """x, t and conditions in the model's order and types.

        Raises:
            InputError: naming the tensor, what was given and what is needed.
        """
        names = [spec.name for spec in signature.conditions]
        unknown, missing = set(self.conditions) - set(names), set(names) - set(self.conditions)
        if unknown or missing:
            wrong = f"missing {sorted(missing)}" if missing else f"unknown {sorted(unknown)}"
            raise InputError(f"calibration: {wrong}; the model takes conditions {names}")
        given = [("x", self.x), ("t", self.t), *((f"condition {n!r}", self.conditions[n]) for n in names)]
        count = self.x.shape[0] if isinstance(self.x, Tensor) and self.x.dim() else 0
        return [_fitting(spec, name, value, count) for spec, (name, value) in zip(signature.inputs, given, strict=True)]


def _fitting(spec: InputSpec, name: str, value: object, count: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise InputError(f"calibration: {name} is {type(value).__name__}, expected a tensor {['N', *spec.shape]}")
    if list(value.shape) != [count, *spec.shape] or not count:
        raise InputError(f"calibration: {name} has shape {list(value.shape)}, expected {[count or 'N', *spec.shape]}")
    if spec.role == "x" and not value.is_floating_point():
        raise InputError(f"calibration: x is {value.dtype}, expected floating point values around [-1, 1]")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise InputError(f"calibration: {name} holds NaN or infinite values")
    if spec.role == "t":
        if bool((value < 0).any()):
            raise InputError(f"calibration: t holds {float(value.min()):g}, expected timesteps of 0 or more")
        return as_timesteps(value.detach(), spec.dtype).cpu()
    if value.is_floating_point() and not spec.dtype.is_floating_point:
        raise InputError(f"calibration: {name} is {value.dtype}, the model takes {spec.dtype}")
    if spec.num_classes is not None and not bool(((value >= 0) & (value < spec.num_classes)).all()):
        raise InputError(
            f"calibration: {name} holds labels {int(value.min())} to {int(value.max())}, allowed 0 to "
            f"{spec.num_classes - 1}"
        )
    return value.detach().to("cpu", spec.dtype).contiguous()


def given_set(program: Program, samples: CalibrationSamples, trajectories: Trajectories) -> CalibrationSet:
    """The calibration set of a user's samples.

    Each sample counts for the sampler step whose timestep is nearest. Under guidance it becomes two rows, as collected
    ones do.

    Args:
        trajectories: float trajectories, which sensitivity and mean correction still measure on.

    Raises:
        InputError: samples that the model cannot be called with.
    """
    x, t, *conditions = samples.inputs(program.signature)
    step = (trajectories.t.double()[None, :] - t.double()[:, None]).abs().argmin(dim=1)
    counts = torch.bincount(step, minlength=trajectories.t.numel())
    zeros = torch.zeros(counts.numel(), dtype=torch.float64)
    sha = digest_of([x, t, *conditions])
    if program.sampler.guided:
        x, t, step, conditions = _doubled(program.sampler, x, t, step, conditions)
    return CalibrationSet(x, t, tuple(conditions), step, Allocation(counts, zeros, zeros, 0.0), trajectories, sha)


def _doubled(
    spec: SamplerSpec, x: Tensor, t: Tensor, step: Tensor, conditions: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    both = guidance.interleaved(spec, conditions)
    return x.repeat_interleave(2, dim=0), t.repeat_interleave(2), step.repeat_interleave(2), both


def digest_of(tensors: list[Tensor]) -> str:
    """SHA-256 of types, shapes and values."""
    sha = hashlib.sha256()
    for value in tensors:
        sha.update(f"{value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
