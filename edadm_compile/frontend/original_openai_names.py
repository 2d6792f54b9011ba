"""Names of OpenAI's ``UNetModel`` with self-attention, to those of a diffusers ``UNet2DModel``."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from edadm_compile.frontend.original_settings import Settings

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}


def entry(blocks: int, settings: Settings, name: str, value: Tensor) -> dict[str, Tensor]:
    """Tensors by diffusers' names for one of the original: three for a joint projection of queries, keys and values.

    Args:
        blocks: residual blocks per level.
        settings: the number of heads, and how they lie in that projection.
    """
    for old, new in _ENDS.items():
        if name.startswith(f"{old}."):
            return {f"{new}.{name.removeprefix(f'{old}.')}": value}
    place, sub, rest = _place(blocks, name)
    if rest.startswith(("op.", "conv.")):
        return {f"{place}.{sub}.conv.{rest.partition('.')[2]}": value}
    if rest.startswith(("norm.", "qkv.", "proj_out.")):
        return _attention(settings, f"{place}.{sub.replace('resnets', 'attentions')}", rest, value)
    for old, new in _RESIDUAL.items():
        if rest.startswith(f"{old}."):
            return {f"{place}.{sub}.{new}.{rest.removeprefix(f'{old}.')}": value}
    return {name: value}  # of no known kind: loading will name it


def _place(blocks: int, name: str) -> tuple[str, str, str]:
    """Where a tensor goes: block, module in it, and what is left of the name."""
    found = re.fullmatch(r"(input|output|middle)_blocks?\.(\d+)(?:\.(\d+))?\.(\D.*)", name)
    if found is None:
        return "", "", name
    part, number, inner, rest = found.group(1), int(found.group(2)), int(found.group(3) or 0), found.group(4)
    if part == "middle":  # residual, attention, residual
        return "mid_block", f"resnets.{number // 2}", rest
    per_level = blocks + 1
    if part == "input":
        level, index = divmod(number - 1, per_level)
        down = index == blocks
        return f"down_blocks.{level}", "downsamplers.0" if down else f"resnets.{index}", rest
    level, index = divmod(number, per_level)
    up = inner > 0 and rest.startswith(("conv.", "in_layers", "emb_layers", "out_layers", "skip_connection"))
    return f"up_blocks.{level}", "upsamplers.0" if up else f"resnets.{index}", rest


def _attention(settings: Settings, place: str, rest: str, value: Tensor) -> dict[str, Tensor]:
    part, _, kind = rest.partition(".")
    if part == "norm":
        return {f"{place}.group_norm.{kind}": value}
    matrix = value.flatten(1) if kind == "weight" else value
    if part == "proj_out":
        return {f"{place}.to_out.0.{kind}": matrix}
    width = matrix.shape[0] // 3
    heads = settings.heads or width // (settings.head_channels or width)
    if settings.new_attention_order:
        parts = list(matrix.chunk(3))
    else:  # head by head: its queries, its keys, its values
        split = matrix.reshape(heads, 3, width // heads, *matrix.shape[1:])
        parts = [torch.flatten(split[:, i], 0, 1) for i in range(3)]
    return {f"{place}.to_{n}.{kind}": p for n, p in zip("qkv", parts, strict=True)}
