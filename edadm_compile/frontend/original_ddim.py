"""The UNet of Ho et al. as ermongroup/ddim and pesser/pytorch_diffusion write it, to a diffusers ``UNet2DModel``.

Both compute the same: residual blocks with swish and GroupNorm (eps 1e-6), single-head attention by 1x1 convolutions,
downsampling after one column and row of padding on the right and at the bottom.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from edadm_compile.errors import InputError

#: Every published configuration attends at this resolution alone.
_ATTENDED = 16
_RENAMED = {
    "nin_shortcut": "conv_shortcut",
    "temb_proj": "time_emb_proj",
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.attn_1": "mid_block.attentions.0",
    "mid.block_2": "mid_block.resnets.1",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def config_of(state: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Configuration of the ``UNet2DModel``, read off names and shapes.

    Raises:
        InputError: resampling without convolutions, or names that are not of this network.
    """
    levels = 1 + max(int(m.group(1)) for name in state if (m := re.match(r"down\.(\d+)\.", name)))
    blocks = len({m.group(1) for name in state if (m := re.match(r"down\.0\.block\.(\d+)\.", name))})
    attended = [f"down.{i}.attn.0.q.weight" in state for i in range(levels)]
    if levels > 1 and "down.0.downsample.conv.weight" not in state:
        raise InputError(
            f"{where}: this network resamples without convolutions (resamp_with_conv: False), which diffusers' UNet2DModel does "
            "not; compile it with --factory"
        )
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attended]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attended)]
    size = _ATTENDED << attended.index(True) if any(attended) else None
    return {
        "sample_size": size,
        "in_channels": state["conv_in.weight"].shape[1],
        "out_channels": state["conv_out.weight"].shape[0],
        "block_out_channels": [state[f"down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)],
        "layers_per_block": blocks,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
    }


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by diffusers' names."""
    levels = 1 + max(int(m.group(1)) for name in state if (m := re.match(r"down\.(\d+)\.", name)))
    return dict(_entry(name, value, levels) for name, value in state.items())


def _entry(name: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    name = re.sub(r"^down\.(\d+)\.", r"down_blocks.\1.", name)
    name = re.sub(r"^up\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m.group(1))}.", name)
    name = name.replace(".block.", ".resnets.").replace(".attn.", ".attentions.")
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    attention = re.fullmatch(r"(.*\.attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    if attention is None:
        return name, value
    place, part, kind = attention.groups()
    matrix = value.flatten(1) if kind == "weight" and part != "norm" else value  # 1x1 convolutions as linear layers
    return f"{place}.{_ATTENTION.get(part, part)}.{kind}", matrix
