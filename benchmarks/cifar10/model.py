"""The DDIM CIFAR-10 UNet family (Ho et al., arXiv 2006.11239; Song et al., arXiv 2010.02502) as diffusers builds it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

#: Levels of resolution 32, 16, 8, 4: channels as multiples of the width. Attention at 16x16 alone.
MULTIPLES = (1, 2, 2, 2)
_ATTENTION = 1


def unet_config(width: int, layers: int, *, conditional: bool) -> dict[str, Any]:
    """Arguments of ``UNet2DModel``; width 128 with 2 layers is the paper's network of 35.7 million parameters.

    Args:
        width: channels at 32x32, a multiple of 8.
        layers: residual blocks in each level.
        conditional: class labels as a second condition beside the timestep.
    """
    count = len(MULTIPLES)
    down = ["AttnDownBlock2D" if i == _ATTENTION else "DownBlock2D" for i in range(count)]
    up = ["AttnUpBlock2D" if i == _ATTENTION else "UpBlock2D" for i in reversed(range(count))]
    return {
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": layers,
        "center_input_sample": False, "time_embedding_type": "positional", "freq_shift": 1, "flip_sin_to_cos": False,
        "block_out_channels": [width * m for m in MULTIPLES], "mid_block_scale_factor": 1, "downsample_padding": 0,
        "down_block_types": down, "up_block_types": up, "act_fn": "silu", "attention_head_dim": None,
        "norm_num_groups": 32 if width % 32 == 0 else 8, "norm_eps": 1e-6,
        **({"num_class_embeds": 10} if conditional else {}),
    }  # fmt: skip


def scheduler_config(schedule: str, prediction: str) -> dict[str, Any]:
    """A DDIM scheduler configuration.

    Args:
        schedule: "linear" (as DDPM) or "cosine" (Nichol & Dhariwal, arXiv 2102.09672).
        prediction: "epsilon" (as DDPM) or "v_prediction" (Salimans & Ho, arXiv 2202.00512).
    """
    return {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
        "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule], "clip_sample": True,
        "prediction_type": prediction, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": True,
    }  # fmt: skip


def save_folder(model: UNet2DModel, scheduler: dict[str, Any], folder: Path, about: dict[str, Any]) -> None:
    """Write a diffusers folder: config.json, fp16 safetensors, scheduler_config.json, and training.json.

    The folder appears under its name only when it is complete; one that was there is replaced.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    state = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(state, fresh / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    model.save_config(fresh)
    (fresh / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    (fresh / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
