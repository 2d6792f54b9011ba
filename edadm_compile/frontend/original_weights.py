"""Weights in checkpoints of the authors' own code: where they are in the file, and their running average if it has one.

======================  =====================================================  ===============================================
layout                  names                                                  written by
======================  =====================================================  ===============================================
``DDIM``                ``down.0.block.0.conv1.weight``, ``temb.dense.0.bias``  ermongroup/ddim, pesser/pytorch_diffusion
``OPENAI``              ``input_blocks.1.0.in_layers.2.weight``                 openai/improved-diffusion, guided-diffusion,
                                                                               CompVis latent-diffusion, stable-diffusion,
                                                                               Stability-AI (``model.diffusion_model.`` before)
======================  =====================================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from edadm_compile.errors import InputError

DDIM = "ddim"
OPENAI = "openai"
_LATENT = "model.diffusion_model."
_AVERAGE = "model_ema."
_LABELS = "cond_stage_model.embedding.weight"
#: Names that a layout has and no other.
_MARKS = {
    DDIM: ("temb.dense.0.weight", "mid.block_1.conv1.weight", "conv_in.weight"),
    OPENAI: ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.2.weight"),
}
#: Where trainers put the state dict.
_HOLDERS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds of a UNet.

    Attributes:
        layout: `DDIM` or `OPENAI`.
        state: tensors by the names of that layout, without prefixes.
        averaged: whether they are the running average (EMA) of training.
        labels: embeddings [K, D] of class labels for cross-attention (CompVis' ClassEmbedder), where there are any.
    """

    layout: str
    state: dict[str, Tensor]
    averaged: bool = False
    labels: Tensor | None = None


def layout_of(names: Iterable[str]) -> tuple[str, str] | None:
    """Layout and prefix of the names in a state dict; None when it is of neither."""
    known = set(names)
    for layout, marks in _MARKS.items():
        for prefix in ("", "module.", _LATENT, "diffusion_model.", "model."):
            if all(prefix + mark in known for mark in marks):
                return layout, prefix
    return None


def find_weights(value: Any, path: Path) -> Weights | None:
    """The UNet in a loaded checkpoint; None when it is of no known layout.

    ermongroup/ddim saves a list: model, optimizer, epoch, step and, with averaging on, the average.

    Raises:
        InputError: an average of which tensors are missing.
    """
    if isinstance(value, list) and value and _tensors(value[0]):
        averaged = len(value) >= 5 and _tensors(value[4]) and layout_of(value[4]) is not None
        found = find_weights(value[4 if averaged else 0], path)
        return None if found is None else Weights(found.layout, found.state, averaged)
    for key in _HOLDERS:
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
            break
    return from_state(value, path) if _tensors(value) else None


def from_state(state: Mapping[str, Any], path: Path) -> Weights | None:
    """The UNet in a state dict; see `find_weights`."""
    found = layout_of(state)
    if found is None:
        return None
    layout, prefix = found
    plain = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and isinstance(v, Tensor)}
    if prefix != _LATENT:
        return Weights(layout, plain)
    labels = state.get(_LABELS)
    average = _average(state, plain, path)
    return Weights(layout, average or plain, bool(average), labels if isinstance(labels, Tensor) else None)


def _average(state: Mapping[str, Any], plain: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The average of a CompVis checkpoint, which is kept under names without dots; empty when the file has none."""
    if not any(name.startswith(_AVERAGE) and "diffusion_model" in name for name in state):
        return {}
    names = {name: _AVERAGE + f"diffusion_model.{name}".replace(".", "") for name in plain}
    missing = [name for name in names if names[name] not in state]
    if missing:
        raise InputError(
            f"{path} holds an average of the weights (model_ema.*) that lacks {len(missing)} of {len(names)} tensors, such as "
            f"{names[missing[0]]!r}; the file is damaged, or remove the model_ema entries from it"
        )
    return {name: state[average] for name, average in names.items()}


def read_safetensors(path: Path) -> Weights | None:
    """The UNet in a safetensors file of a whole model, without reading the rest; None when it is of no known layout.

    Raises:
        InputError: unreadable, or as `find_weights`.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = layout_of(names)
            if found is None:
                return None
            wanted = [n for n in names if n.startswith((found[1], _AVERAGE)) or n == _LABELS]
            state = {name: file.get_tensor(name) for name in wanted}
    except Exception as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None
    return from_state(state, path)


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
