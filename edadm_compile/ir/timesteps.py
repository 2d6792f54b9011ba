"""Timesteps in the type that a model takes."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_compile.errors import InputError


def as_timesteps(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Timesteps in the type of the model's input: samplers hand whole ones to models of continuous time too.

    The other way round nothing is cut off: 832.5 as 832 would be a prediction for another noise level.

    Args:
        t: [B] or [], any type.
        dtype: of the model's timestep input.

    Raises:
        InputError: a timestep that is not whole for a model that takes integers.
    """
    if t.is_floating_point() and not dtype.is_floating_point and not bool((t == t.round()).all()):
        first = float(t.reshape(-1)[(t != t.round()).reshape(-1)][0])
        raise InputError(
            f"timestep: got {first:g}, this model takes whole ones; compile it with --scheduler FILE.json of the scheduler "
            'that gives such timesteps, or set "timestep_spacing" of the scheduler to "leading" or "trailing"'
        )
    return t.to(dtype)
