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
from edadm_compile.frontend.source import Source
from edadm_compile.ir.program import SamplerSpec

_WEIGHTS = "diffusion_pytorch_model"


def load(
    folder: Path,
    sampler: Callable[[dict[str, Any] | None], SamplerSpec],
    shape: tuple[int, int, int] | None,
    pool: dict[str, Tensor],
) -> Source:
    """Load a model folder, or the ``unet`` folder of a pipeline folder.

    Raises:
        InputError: no configuration, no safetensors weights, or a class that is not a UNet.
    """
    model_dir = folder if (folder / "config.json").exists() else folder / "unet"
    config_file = model_dir / "config.json"
    if not config_file.exists():
        raise InputError(f"{folder} is not a diffusers model: neither config.json nor unet/config.json is there")
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{config_file} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{config_file} holds a {type(config).__name__}, expected the configuration of a diffusers UNet"
        )
    spec = sampler(_find_scheduler(model_dir))
    model = checkpoint.build(str(config.get("_class_name")), config, str(config_file))
    files = _weight_files(model_dir)
    state: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    from safetensors.torch import load_file

    for file in files:
        try:
            state.update(load_file(file))
        except Exception as error:
            raise InputError(f"{file} is not a readable safetensors file: {error}") from None
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    checkpoint.load_weights(model, state, str(model_dir))
    origin = {"file": folder.name, "sha256": digest.hexdigest()}
    return checkpoint.diffusers_source(model, spec, shape, pool, origin)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not a safetensors index with a weight_map: {error}") from None
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
