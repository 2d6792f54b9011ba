"""The checkpoint dictionary: a class name, its configuration, a state dict and a scheduler, all plain values.

::

    torch.save({
        "format": "edadm_compile.checkpoint/1",
        "model": {"class_name": "UNet2DModel", "config": {...}},
        "state_dict": {...},                        # any float dtype
        "scheduler": {"_class_name": "DDIMScheduler", ...},
        "sampler": {"steps": 50},                   # optional
    }, "model.pt")

loads with ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edadm_compile.errors import InputError
from edadm_compile.frontend.added_conditions import takes_added_conditions
from edadm_compile.frontend.prompts import Encoded
from edadm_compile.frontend.size_check import check_fits
from edadm_compile.frontend.source import Source, source_from_module
from edadm_compile.frontend.unfilled import build_unfilled, fill
from edadm_compile.ir.program import SamplerSpec

FORMAT = "edadm_compile.checkpoint/1"
#: diffusers classes a checkpoint or folder may name.
MODEL_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")


def is_checkpoint(value: Any) -> bool:
    """Whether a loaded object is a checkpoint dictionary of any version."""
    return isinstance(value, dict) and str(value.get("format", "")).startswith("edadm_compile.checkpoint/")


def load(
    value: dict[str, Any],
    path: Path,
    sampler: Callable[[dict[str, Any] | None, int | None], SamplerSpec],
    shape: tuple[int, int, int] | None,
    conditions: Callable[[dict[str, Any]], Encoded],
    origin: dict[str, Any],
) -> Source:
    """Build the source a checkpoint dictionary describes.

    Args:
        conditions: condition tensors, given the model's configuration.

    Raises:
        InputError: a missing or wrong entry.
    """
    if value["format"] != FORMAT:
        raise InputError(f"{path}: checkpoint format {value['format']!r}, this version reads {FORMAT!r}")
    missing = [key for key in ("model", "state_dict") if not isinstance(value.get(key), dict)]
    missing += [key for key in ("scheduler", "sampler") if not isinstance(value.get(key) or {}, dict)]
    if missing:
        raise InputError(f"{path}: checkpoint has no dictionary {missing[0]!r}")
    if not isinstance(value["model"].get("config") or {}, dict):
        raise InputError(f"{path}: checkpoint's model has no dictionary 'config'")
    class_name, config = str(value["model"].get("class_name")), dict(value["model"].get("config") or {})
    shapes = shapes_of(value["state_dict"], str(path))
    check_fits(lambda: build(class_name, config, str(path)), config, shapes, str(path))
    model = build(class_name, config, str(path))
    load_weights(model, value["state_dict"], str(path))
    steps = (value.get("sampler") or {}).get("steps")
    return diffusers_source(model, sampler(value.get("scheduler"), steps), shape, conditions(config), origin)


def build(class_name: str, config: dict[str, Any], where: str) -> nn.Module:
    """Instantiate a diffusers UNet from its configuration, for `load_weights` to fill.

    Raises:
        InputError: a class outside `MODEL_CLASSES`, or a configuration it refuses.
    """
    if class_name not in MODEL_CLASSES:
        raise InputError(
            f"{where}: model class {class_name!r}, allowed {', '.join(MODEL_CLASSES)}; for any other model use a .pt2 archive or --factory"
        )
    import diffusers

    try:
        model = build_unfilled(lambda: getattr(diffusers, class_name).from_config(config))
    except Exception as error:
        raise InputError(f"{where}: {class_name} refuses its configuration: {error}") from None
    assert isinstance(model, nn.Module)
    return model


def shapes_of(state: dict[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict's tensors by name.

    Raises:
        InputError: an entry that is no tensor.
    """
    foreign = [k for k, v in state.items() if not isinstance(v, Tensor)]
    if foreign:
        raise InputError(
            f"{where}: state dict entry {str(foreign[0])[:200]!r} is a {type(state[foreign[0]]).__name__}, expected tensors only"
        )
    return {str(k): tuple(v.shape) for k, v in state.items()}


def load_weights(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load a state dict strictly.

    Tensors of the model's types are taken as they are: mapped from a file, they stay there until they are read. Those of
    another type are converted.

    Raises:
        InputError: missing, unexpected or wrongly shaped tensors.
    """
    shapes_of(state, where)
    try:
        fill(model, state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"{where}: weights do not fit the model: {lines[1] if len(lines) > 1 else lines[0]}"[:400]
        ) from None


def diffusers_source(
    model: nn.Module,
    sampler: SamplerSpec,
    shape: tuple[int, int, int] | None,
    text: Encoded,
    origin: dict[str, Any],
) -> Source:
    """A source for a diffusers UNet: labels are drawn at random, other conditions come from the user's tensors or prompts."""
    pool = text.conditions
    classes: Any = getattr(model.config, "num_class_embeds", None)
    if type(model).__name__ == "DiTTransformer2DModel":
        classes = getattr(model.config, "num_embeds_ada_norm", None)
        model.null_label = classes  # its table of embeddings ends with one for "no class"
    labelled = {} if classes is None or "class_labels" in pool else {"class_labels": int(classes)}
    if "encoder_hidden_states" not in pool and type(model).__name__ == "UNet2DConditionModel":
        width = getattr(model.config, "cross_attention_dim", "D")
        added = ", 'text_embeds' [N, D] and 'time_ids' [N, 6]" if takes_added_conditions(model) else ""
        raise InputError(
            f"UNet2DConditionModel needs text conditions: give calibration prompts with --prompts FILE (and --pipeline FOLDER for "
            f"the text encoder), or encoded ones with --cond FILE.safetensors holding 'encoder_hidden_states' [N, tokens, {width}]{added}"
        )
    source = source_from_module(
        model, sampler, shape=shape, conditions=pool, num_classes=labelled, fixed={"return_dict": False}, origin=origin
    )  # fmt: skip
    return replace(source, null=text.null)
