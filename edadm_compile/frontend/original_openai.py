"""OpenAI's ``UNetModel``, also as CompVis and Stability AI use it, to the diffusers class that computes the same.

With cross-attention (``SpatialTransformer``) that is ``UNet2DConditionModel``, converted by diffusers itself. With
self-attention alone (``AttentionBlock``) it is ``UNet2DModel``, which diffusers has no converter for: see `_convert_plain`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from edadm_compile.errors import InputError
from edadm_compile.frontend.original_openai_names import entry
from edadm_compile.frontend.original_settings import Settings, completed, published

_SDXL_CONTEXTS = (2048, 1280)


@dataclass(frozen=True)
class Layout:
    """What names and shapes say of a network.

    Attributes:
        channels: of each level.
        blocks: residual blocks per level.
        attended: whether a level has attention.
        depths: transformer blocks per attention of each level, 0 for self-attention alone.
        context: width of the cross-attention's input, None without.
        resampling: "conv" or "resnet".
        scale_shift: whether the timestep scales as well as shifts.
    """

    state: dict[str, Tensor]
    channels: tuple[int, ...]
    blocks: int
    attended: tuple[bool, ...]
    depths: tuple[int, ...]
    context: int | None
    resampling: str
    scale_shift: bool

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Channels of each level per channel of the first convolution."""
        return tuple(c // self.base for c in self.channels)

    @property
    def base(self) -> int:
        """Channels of the first convolution."""
        return int(self.state["input_blocks.0.0.weight"].shape[0])

    @property
    def middle_attends(self) -> bool:
        """Whether the middle has attention."""
        return any(name.startswith("middle_block.2.") for name in self.state)


def layout_of(state: dict[str, Tensor], where: str) -> Layout:
    """Read a network's structure off its tensors.

    Raises:
        InputError: levels of different depth, or resampling without convolutions.
    """
    outputs = 1 + max(_number(name, "output_blocks") for name in state)
    ups = [i for i in range(outputs) if _upsamples(state, i)]
    blocks = ups[0] if ups else outputs - 1
    levels = outputs // (blocks + 1)
    if outputs != levels * (blocks + 1) or ups != [(i + 1) * (blocks + 1) - 1 for i in range(levels - 1)]:
        raise InputError(
            f"{where}: its levels have different numbers of blocks, or it resamples without convolutions (conv_resample: False); "
            "such a network is compiled with --factory"
        )
    first = [i * (blocks + 1) + 1 for i in range(levels)]
    inside = [[n for n in state if n.startswith(f"input_blocks.{i}.1.")] for i in first]
    depths = [len({_number(n, "transformer_blocks") for n in names if "transformer_blocks" in n}) for names in inside]
    context = next((v.shape[1] for n, v in state.items() if n.endswith("attn2.to_k.weight")), None)
    emb = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    channels = tuple(int(state[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0]) for i in first)
    updown = f"input_blocks.{blocks + 1}.0.in_layers.2.weight" in state and levels > 1
    return Layout(
        state=state,
        channels=channels,
        blocks=blocks,
        attended=tuple(bool(names) for names in inside),
        depths=tuple(depths),
        context=context,
        resampling="resnet" if updown else "conv",
        scale_shift=emb == 2 * channels[0],
    )


def _number(name: str, part: str) -> int:
    found = re.search(rf"\b{part}\.(\d+)\.", name)
    return -1 if found is None else int(found.group(1))


def _upsamples(state: dict[str, Tensor], block: int) -> bool:
    """Whether an output block ends with upsampling: a convolution, or a residual block after the first."""
    ends = (f"output_blocks.{block}.{i}.{n}.weight" for i in (1, 2) for n in ("conv", "in_layers.2"))
    return any(name in state for name in ends)


def settings_of(layout: Layout, given: Settings | None, where: str) -> Settings:
    """The user's settings, else those of the published model of this shape.

    Raises:
        InputError: the number of heads is unknown.
    """
    found = completed(given or Settings(), published(layout.base, layout.multipliers, layout.context))
    attends = any(layout.attended) or layout.middle_attends
    if attends and found.heads is None and found.head_channels is None:
        raise InputError(
            f"{where}: the number of attention heads is not in the weights ({layout.base} channels, multipliers "
            f"{list(layout.multipliers)}); give the YAML file the model was trained with, --original-config FILE.yaml, or one that "
            "says num_heads or num_head_channels"
        )
    return found


def convert(layout: Layout, settings: Settings) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Class, configuration and state dict of the diffusers UNet."""
    config = {
        "in_channels": layout.state["input_blocks.0.0.weight"].shape[1],
        "out_channels": layout.state["out.2.weight"].shape[0],
        "sample_size": settings.size,
        "block_out_channels": list(layout.channels),
        "layers_per_block": layout.blocks,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }
    if any(layout.depths):
        return "UNet2DConditionModel", *_convert_transformers(layout, settings, config)
    return "UNet2DModel", *_convert_plain(layout, settings, config)


def _convert_transformers(
    layout: Layout, settings: Settings, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in layout.depths]
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(layout.depths)]
    projection = next(v for n, v in layout.state.items() if n.endswith("proj_in.weight"))
    heads: Any = settings.heads
    if settings.head_channels is not None:
        heads = [c // settings.head_channels for c in layout.channels]
    config |= {
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": layout.context,
        "attention_head_dim": heads,  # the number of heads, in this class
        "transformer_layers_per_block": [max(1, depth) for depth in layout.depths],
        "use_linear_projection": projection.dim() == 2,
    }
    added = layout.state.get("label_emb.0.0.weight")
    if added is not None and layout.context in _SDXL_CONTEXTS:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": added.shape[1],
        }
    elif added is not None:
        config |= {"class_embed_type": "projection", "projection_class_embeddings_input_dim": added.shape[1]}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in layout.state.items()}
    return config, dict(convert_ldm_unet_checkpoint(prefixed, config))


def _convert_plain(
    layout: Layout, settings: Settings, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Rename; split the joint projection of queries, keys and values; 1x1 convolutions become linear layers."""
    plain_down = "ResnetDownsampleBlock2D" if layout.resampling == "resnet" else "DownBlock2D"
    plain_up = "ResnetUpsampleBlock2D" if layout.resampling == "resnet" else "UpBlock2D"
    config |= {
        "down_block_types": ["AttnDownBlock2D" if a else plain_down for a in layout.attended],
        "up_block_types": ["AttnUpBlock2D" if a else plain_up for a in reversed(layout.attended)],
        "downsample_type": layout.resampling,
        "upsample_type": layout.resampling,
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "attention_head_dim": _head_dim(layout, settings),
        "add_attention": layout.middle_attends,
        "attn_norm_num_groups": 32,  # of the middle; with scale_shift it has no norm unless one is asked for
    }
    if "label_emb.weight" in layout.state:
        config["num_class_embeds"] = layout.state["label_emb.weight"].shape[0]
    state: dict[str, Tensor] = {}
    for name, value in layout.state.items():
        state |= entry(layout.blocks, settings, name, value)
    return config, state


def _head_dim(layout: Layout, settings: Settings) -> int:
    """Channels per head that divides every level; `set_heads` corrects the number of heads where that is what is fixed."""
    if settings.head_channels is not None:
        return settings.head_channels
    attended = [c for c, a in zip(layout.channels, layout.attended, strict=True) if a] or [layout.channels[-1]]
    return math.gcd(*attended, layout.channels[-1])


def set_heads(model: nn.Module, heads: int) -> None:
    """Give every attention the same number of heads, whatever its channels: the configuration cannot say so."""
    from diffusers.models.attention_processor import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = heads
            module.scale = (module.inner_dim // heads) ** -0.5
