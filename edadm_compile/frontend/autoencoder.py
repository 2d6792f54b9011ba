"""The autoencoder of a latent model: only ``sample`` opens it, to turn latents into images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.errors import InputError

#: diffusers classes that decode latents.
CLASSES = ("AutoencoderKL", "VQModel", "AutoencoderTiny")
#: Names of the autoencoder's folder in a pipeline folder.
_FOLDERS = ("vae", "vqvae")
#: Images that are decoded at a time: an autoencoder's activations are many times larger than a UNet's.
_BATCH = 4
_USUAL_DOWNSCALING = 8


def find_autoencoder(folder: Path | None) -> Path:
    """The autoencoder's folder in a pipeline folder, or beside the model folder in one.

    Raises:
        InputError: there is none.
    """
    places = [] if folder is None else [folder, folder.resolve().parent]
    found = (place / name for place in places for name in _FOLDERS)
    chosen = next((p for p in found if (p / "config.json").exists()), None)
    if chosen is None:
        where = "no pipeline folder was given" if folder is None else f"{folder} has no folder {' or '.join(_FOLDERS)}"
        raise InputError(
            f"--decode: {where}; name the autoencoder with --vae FOLDER, or the pipeline with --pipeline FOLDER"
        )
    return chosen


def downscaling(pipeline: Path) -> int:
    """Pixels of an image per position of its latent, along each side; that of Stable Diffusion where nothing is said."""
    for name in _FOLDERS:
        try:
            levels = json.loads((pipeline / name / "config.json").read_text())["block_out_channels"]
            return int(2 ** (len(levels) - 1))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return _USUAL_DOWNSCALING


class Decoder:
    """Latents to images.

    Args:
        folder: a diffusers autoencoder's, with config.json and safetensors weights.

    Raises:
        InputError: another class, or weights that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        import diffusers

        try:
            name = str(json.loads((folder / "config.json").read_text())["_class_name"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"--vae {folder}: no configuration of an autoencoder there: {error}") from None
        if name not in CLASSES:
            raise InputError(f"--vae {folder} holds a {name}, supported are {', '.join(CLASSES)}")
        if not list(folder.glob("*.safetensors")):
            raise InputError(f"--vae {folder} has no .safetensors weights (a .bin file is a pickle)")
        plain = (folder / "diffusion_pytorch_model.safetensors").exists() or list(folder.glob("*.index.json"))
        try:
            model: Any = getattr(diffusers, name).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, variant=None if plain else "fp16"
            )
        except Exception as error:
            raise InputError(f"--vae {folder} cannot be loaded: {str(error).splitlines()[0][:300]}") from None
        assert isinstance(model, nn.Module)
        self.folder = folder
        self.model: Any = model.float().eval()

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents float32 [N, C, h, w] to images [N, 3, H, W] in about [-1, 1], as diffusers' pipelines decode them.

        Raises:
            InputError: latents of another number of channels than the autoencoder's.
        """
        config = self.model.config
        channels = getattr(config, "latent_channels", None)
        if channels != latents.shape[1]:
            raise InputError(
                f"--vae {self.folder} decodes latents of {channels} channels, the model makes {latents.shape[1]}"
            )
        scale = getattr(config, "scaling_factor", None) or 1.0
        shift = getattr(config, "shift_factor", None) or 0.0
        parts = []
        with torch.no_grad():
            for piece in latents.split(_BATCH):
                parts.append(self.model.decode(piece / scale + shift).sample)
        return torch.cat(parts)
