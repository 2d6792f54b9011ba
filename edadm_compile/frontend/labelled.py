"""Class-conditional latent diffusion: a UNet whose cross-attention reads one embedding of the class label.

CompVis trains the table of embeddings (``ClassEmbedder``) beside the UNet; here both are one network with the label as
its condition, so that labels can be drawn, given with ``--label``, and left out for guidance.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def with_labels(unet: nn.Module, table: Tensor) -> nn.Module:
    """A ``UNet2DConditionModel`` that takes ``class_labels`` int64 [B] in place of ``encoder_hidden_states``.

    Args:
        unet: shares its weights with the result.
        table: embeddings float [K, D], D the UNet's ``cross_attention_dim``.
    """
    labelled = copy.copy(unet)
    labelled.__class__ = _labelled_class()
    labelled._modules = {
        **unet._modules,
        "label_embedding": nn.Embedding.from_pretrained(table.float().clone()),
    }  # table may be mapped from a file
    return labelled


def _labelled_class() -> type[nn.Module]:
    from diffusers import UNet2DConditionModel as Base

    class UNet2DConditionModel(Base):  # type: ignore[misc]  # the name that reports show
        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True) -> Any:
            context = self.label_embedding(class_labels)[:, None]
            return super().forward(sample, timestep, context, return_dict=return_dict)

    return UNet2DConditionModel
