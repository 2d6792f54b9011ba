"""diffusers model folders: config.json with safetensors weights, scheduler_config.json beside or above."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from edadm_compile.calibration.sampler import read_scheduler
from edadm_compile.errors import InputError
from edadm_compile.frontend import checkpoint
from edadm_compile.frontend.prompts import Encoded
from edadm_compile.frontend.size_check import check_fits
from edadm_compile.frontend.source import Source
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.texts import read_text

_WEIGHTS = "diffusion_pytorch_model"
_MOST_FILES = 1000


def load(
    folder: Path,
    sampler: Callable[[dict[str, Any] | None], SamplerSpec],
    shape: tuple[int, int, int] | None,
    conditions: Callable[[dict[str, Any]], Encoded],
) -> Source:
    """Load a model folder, or the ``unet`` (or ``transformer``) folder of a pipeline folder.

    Args:
        conditions: condition tensors, given the model's configuration.

    Raises:
        InputError: no configuration, no safetensors weights, or a class that is not a UNet.
    """
    places = (folder, folder / "unet", folder / "transformer")
    model_dir = next((p for p in places if (p / "config.json").exists()), folder)
    config_file = model_dir / "config.json"
    if not config_file.exists():
        raise InputError(f"{folder} is not a diffusers model: neither config.json nor unet/config.json is there")
    try:
        config = json.loads(read_text(config_file))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{config_file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{config_file} holds a {type(config).__name__}, expected the configuration of a diffusers UNet"
        )
    spec = sampler(_find_scheduler(model_dir))
    files = _weight_files(model_dir)
    class_name = str(config.get("_class_name"))
    check_fits(lambda: checkpoint.build(class_name, config, str(config_file)), config, _shapes(files), str(model_dir))
    model = checkpoint.build(class_name, config, str(config_file))
    state: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    from safetensors.torch import load_file

    for file in files:
        try:
            state.update(load_file(file))  # mapped, not read
        except Exception as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from None
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    checkpoint.load_weights(model, state, str(model_dir))
    origin = {"file": folder.name, "sha256": digest.hexdigest()}
    return checkpoint.diffusers_source(model, spec, shape, conditions(config), origin)


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights by name, from the headers of their files."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} is not a readable safetensors file: it is missing, or no regular file")
        try:
            with safe_open(file, framework="pt") as opened:
                shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
        except Exception as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from None
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index} is not a safetensors index with a weight_map: {error}") from None
        if len(names) > _MOST_FILES or not all(isinstance(name, str) for name in names):
            raise InputError(f"{index} names {len(names)} files, allowed {_MOST_FILES}")
        return [folder / Path(name).name for name in names]
    candidates = [folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.fp16.safetensors"]
    found = [file for file in candidates if file.exists()][:1]
    if not found:
        legacy = (
            " (a .bin file is a pickle: convert it with save_pretrained(safe_serialization=True))"
            if list(folder.glob("*.bin"))
            else ""
        )
        raise InputError(f"{folder} has no {_WEIGHTS}.safetensors{legacy}")
    return found


def _find_scheduler(model_dir: Path) -> dict[str, Any] | None:
    places = (model_dir, model_dir.parent, model_dir / "scheduler", model_dir.parent / "scheduler")
    found = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").exists()), None)
    return None if found is None else read_scheduler(found)
