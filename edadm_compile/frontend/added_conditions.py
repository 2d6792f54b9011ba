"""SDXL's added conditions as inputs of their own.

A ``UNet2DConditionModel`` with ``addition_embed_type`` "text_time" takes ``added_cond_kwargs={"text_embeds": [B, D],
"time_ids": [B, 6]}``. A program has tensors as inputs, no dictionaries, so the module that is captured has these two in
its signature. `runtime.session` takes the dictionary apart again when a pipeline calls the compiled model.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from edadm_compile.errors import InputError

#: What ``added_cond_kwargs`` holds for "text_time".
ADDED = ("text_embeds", "time_ids")


def with_flat_conditions(module: nn.Module) -> nn.Module:
    """The same network with the added conditions as parameters of its forward; any other module is returned as it is.

    The network given is not changed; both share their weights.

    Raises:
        InputError: added conditions of another kind than SDXL's.
    """
    if not takes_added_conditions(module):
        return module
    kind = getattr(module.config, "addition_embed_type", None)
    if kind != "text_time":
        raise InputError(
            f"{type(module).__name__}: addition_embed_type {kind!r} is not supported, allowed are None and 'text_time' (SDXL); "
            "export the network with torch.export, its conditions as tensors, and compile the .pt2 file"
        )
    flat = copy.copy(module)
    flat.__class__ = _text_time_class()
    return flat


def takes_added_conditions(module: nn.Module) -> bool:
    """Whether a module is a diffusers UNet that is called with ``added_cond_kwargs``."""
    if not type(module).__module__.startswith("diffusers."):
        return False
    return getattr(getattr(module, "config", None), "addition_embed_type", None) is not None


def _text_time_class() -> type[nn.Module]:
    from diffusers import UNet2DConditionModel as Base

    class UNet2DConditionModel(Base):  # type: ignore[misc]  # the name that reports show
        def forward(
            self,
            sample: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor,
            text_embeds: Tensor,
            time_ids: Tensor,
            return_dict: bool = True,
        ) -> Any:
            added = {"text_embeds": text_embeds, "time_ids": time_ids}
            return super().forward(
                sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=return_dict
            )

    return UNet2DConditionModel
