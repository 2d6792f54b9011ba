"""Checkpoints of the authors' own code as sources: DDIM, latent and stable diffusion, OpenAI's diffusion models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from edadm_compile.errors import InputError
from edadm_compile.frontend import checkpoint, original_ddim, original_openai
from edadm_compile.frontend.labelled import with_labels
from edadm_compile.frontend.original_settings import Settings, ddim_scheduler, find_settings
from edadm_compile.frontend.original_weights import DDIM, Weights
from edadm_compile.frontend.prompts import Encoded
from edadm_compile.frontend.source import Source, source_from_module
from edadm_compile.ir.program import SamplerSpec

#: The schedule of every configuration that ermongroup/ddim publishes.
_DDIM_SCHEDULER = ddim_scheduler(1e-4, 2e-2, "linear")
#: CompVis' cin256-v2: 1000 classes, and one more that stands for none.
_CLASSES_AND_NONE = 1001


def load(
    weights: Weights,
    path: Path,
    settings_file: Path | None,
    sampler: Callable[[dict[str, Any] | None], SamplerSpec],
    shape: tuple[int, int, int] | None,
    conditions: Callable[[dict[str, Any]], Encoded],
    origin: dict[str, Any],
) -> Source:
    """A source for a UNet in its authors' layout.

    Args:
        settings_file: the user's YAML file.
        sampler: makes the sampler from the scheduler configuration that goes with the checkpoint, None if unknown.
        conditions: condition tensors, given the UNet's configuration.

    Raises:
        InputError: a network that cannot be rebuilt from what is known.
    """
    given = find_settings(settings_file, path)
    model, settings, config = build(weights, given, str(path), shape)
    spec = sampler(settings.scheduler)
    origin = {**origin, "layout": weights.layout, "weights": "average" if weights.averaged else "last"}
    text = conditions(config)
    if weights.labels is not None and not text.conditions:
        labelled = with_labels(model, weights.labels)
        count = weights.labels.shape[0]
        if count == _CLASSES_AND_NONE:
            labelled.null_label = count - 1  # type: ignore[assignment]
        return source_from_module(labelled, spec, shape=shape, num_classes={"class_labels": count}, origin=origin)
    return checkpoint.diffusers_source(model, spec, shape, text, origin)


def build(
    weights: Weights, given: Settings | None, where: str, shape: tuple[int, int, int] | None = None
) -> tuple[nn.Module, Settings, dict[str, Any]]:
    """The diffusers UNet that computes what the original did, what was known of it, and its configuration.

    Raises:
        InputError: as `load`.
    """
    if weights.layout == DDIM:
        settings = given or Settings(heads=1, scheduler=_DDIM_SCHEDULER)
        name, config = "UNet2DModel", original_ddim.config_of(weights.state, where)
        state = original_ddim.convert(weights.state)
        config["sample_size"] = settings.size or config["sample_size"]
    else:
        layout = original_openai.layout_of(weights.state, where)
        settings = original_openai.settings_of(layout, given, where)
        name, config, state = original_openai.convert(layout, settings)
    if shape is not None:
        config["sample_size"] = shape[1] if shape[1] == shape[2] else list(shape[1:])
    _check_first_level(weights, config, where)
    model = checkpoint.build(name, config, where)
    checkpoint.load_weights(model, state, where)
    if name == "UNet2DModel" and settings.heads is not None and weights.layout != DDIM:
        original_openai.set_heads(model, settings.heads)
    return model, settings, config


def _check_first_level(weights: Weights, config: dict[str, Any], where: str) -> None:
    """The classes of diffusers have one width for the first convolution, the timestep's embedding and the first level."""
    first, time = ("conv_in", "temb.dense.0") if weights.layout == DDIM else ("input_blocks.0.0", "time_embed.0")
    widths = (weights.state[f"{first}.weight"].shape[0], weights.state[f"{time}.weight"].shape[1])
    level = config["block_out_channels"][0]
    if widths != (level, level):
        raise InputError(
            f"{where}: its first level has {level} channels, its first convolution {widths[0]} and its timestep embedding {widths[1]}; "
            "diffusers has no class for such a network, compile it with --factory"
        )
