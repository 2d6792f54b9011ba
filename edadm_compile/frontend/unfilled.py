"""Modules whose weights are still to come: nothing is drawn at random, and no memory is taken, for what is loaded anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def build_unfilled(make: Callable[[], nn.Module]) -> nn.Module:
    """A module on the meta device, where `fill` can give it everything it needs; else as `make` makes it.

    A buffer that is in no state dict, or a tensor kept as a plain attribute, must be computed: then the module is built
    with memory.
    """
    with torch.device("meta"):
        model = make()
    known = set(model.state_dict())
    computed = [name for name, _ in model.named_buffers() if name not in known]
    plain = any(isinstance(v, Tensor) for m in model.modules() for v in vars(m).values())
    return make() if computed or plain else model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict strictly; tensors of the model's types are taken as they are, so that mapped files stay on disk.

    Raises:
        RuntimeError: missing, unexpected or wrongly shaped tensors.
    """
    types = {k: v.dtype for k, v in model.state_dict().items()}
    values = {k: v.to(types.get(k, v.dtype)).contiguous() for k, v in state.items()}
    model.load_state_dict(values, assign=True)
