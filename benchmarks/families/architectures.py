"""The published architectures that the compiler is measured on, in full size and as reduced-width twins.

Every entry is the configuration of a diffusers class. Where the authors' code is not diffusers, the configuration is the
one that computes the same function (tests/frontend/test_original_*.py compare them); its source is the authors' file.
No weights: `build` draws them at random.

A twin has the same blocks, layers per block, attention levels and conditions, and fewer channels, fewer heads, narrower
conditions and smaller images, so that it can be compiled and sampled on a small machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_LDM_DOWN = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
_LDM_UP = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
_TEXT_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_TEXT_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        key: short name.
        title: name for tables.
        source: where the configuration is published.
        class_name: diffusers class.
        config: its keyword arguments.
        scheduler: diffusers scheduler configuration of the published sampler.
        conditions: shape [...] of one row of each float condition, by the name that ``--cond`` files use.
        labels: number of class labels of ``class_labels``, None for a model without.
        heads: attention heads at every level, for models whose configuration can only say channels per head.
        reduced: entries of `config` that the twin replaces.
        reduced_conditions: the twin's `conditions`.
        reduced_heads: the twin's `heads`.
    """

    key: str
    title: str
    source: str
    class_name: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: int | None = None
    heads: int | None = None
    reduced: Mapping[str, Any] = field(default_factory=dict)
    reduced_conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reduced_heads: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, H, W] of the noisy sample."""
        size = self.config["sample_size"]
        return (self.config["in_channels"], size, size)


def _ddpm(start: float, end: float, schedule: str, **extra: Any) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": schedule,
        "beta_start": start,
        "beta_end": end,
        "clip_sample": False,
        **extra,
    }


_OPENAI = {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5, "norm_num_groups": 32}
_STABLE = {"set_alpha_to_one": False, "steps_offset": 1}

_DDIM_CIFAR10 = Architecture(
    key="ddim-cifar10",
    title="DDIM CIFAR-10",
    source="ermongroup/ddim configs/cifar10.yml; google/ddpm-cifar10-32 unet/config.json",
    class_name="UNet2DModel",
    config={
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
    },
    scheduler=_ddpm(1e-4, 0.02, "linear", clip_sample=True),
    reduced={"sample_size": 16, "block_out_channels": (32, 64, 64, 64)},
)

_LDM_BEDROOMS = Architecture(
    key="ldm4-bedrooms",
    title="LDM-4 LSUN-Bedrooms",
    source="CompVis/latent-diffusion models/ldm/lsun_beds256/config.yaml",
    class_name="UNet2DModel",
    config={
        **_OPENAI,
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
        "layers_per_block": 2,
        "down_block_types": _LDM_DOWN,
        "up_block_types": _LDM_UP,
        "attention_head_dim": 32,
    },
    scheduler=_ddpm(0.0015, 0.0195, "scaled_linear"),
    reduced={
        "sample_size": 16,
        "block_out_channels": (16, 32, 48, 64),
        "norm_num_groups": 16,
        "attention_head_dim": 8,
    },
)

_LDM_CHURCHES = Architecture(
    key="ldm8-churches",
    title="LDM-8 LSUN-Churches",
    source="CompVis/latent-diffusion models/ldm/lsun_churches256/config.yaml",
    class_name="UNet2DModel",
    config={
        **_OPENAI,
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (192, 384, 384, 768, 768),
        "layers_per_block": 2,
        "down_block_types": (*("AttnDownBlock2D",) * 4, "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", *("AttnUpBlock2D",) * 4),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 24,
    },
    scheduler=_ddpm(0.0015, 0.0155, "scaled_linear"),
    heads=8,
    reduced={
        "sample_size": 16,
        "block_out_channels": (16, 32, 32, 64, 64),
        "norm_num_groups": 16,
        "attention_head_dim": 4,
    },
    reduced_heads=4,
)

_LDM_IMAGENET = Architecture(
    key="ldm4-imagenet",
    title="LDM-4 ImageNet",
    source="CompVis/latent-diffusion configs/latent-diffusion/cin256-v2.yaml",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (192, 384, 576, 960),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "attention_head_dim": 1,  # the number of heads in this class
        "cross_attention_dim": 512,
        "norm_num_groups": 32,
    },
    scheduler=_ddpm(0.0015, 0.0195, "scaled_linear"),
    conditions={"encoder_hidden_states": (1, 512)},
    reduced={
        "sample_size": 16,
        "block_out_channels": (16, 32, 48, 80),
        "norm_num_groups": 16,
        "cross_attention_dim": 48,
    },
    reduced_conditions={"encoder_hidden_states": (1, 48)},
)

_SD_15 = Architecture(
    key="sd-1.5",
    title="Stable Diffusion 1.5",
    source="stable-diffusion-v1-5 unet/config.json; CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": _TEXT_DOWN,
        "up_block_types": _TEXT_UP,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "norm_num_groups": 32,
    },
    scheduler=_ddpm(0.00085, 0.012, "scaled_linear", **_STABLE),
    conditions={"encoder_hidden_states": (77, 768)},
    reduced={
        "sample_size": 16,
        "block_out_channels": (16, 32, 64, 64),
        "norm_num_groups": 16,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
    },
    reduced_conditions={"encoder_hidden_states": (77, 32)},
)

_SD_21 = Architecture(
    key="sd-2.1",
    title="Stable Diffusion 2.1",
    source="stable-diffusion-2-1 unet/config.json",
    class_name="UNet2DConditionModel",
    config={
        **_SD_15.config,
        "sample_size": 96,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    scheduler=_ddpm(0.00085, 0.012, "scaled_linear", **_STABLE, prediction_type="v_prediction"),
    conditions={"encoder_hidden_states": (77, 1024)},
    reduced={**_SD_15.reduced, "attention_head_dim": (2, 4, 8, 8)},
    reduced_conditions=_SD_15.reduced_conditions,
)

_SDXL = Architecture(
    key="sdxl",
    title="Stable Diffusion XL",
    source="stable-diffusion-xl-base-1.0 unet/config.json",
    class_name="UNet2DConditionModel",
    config={
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,  # 1280 of the pooled text, 6 numbers in 256 each
        "norm_num_groups": 32,
    },
    scheduler={
        **_ddpm(0.00085, 0.012, "scaled_linear", steps_offset=1, timestep_spacing="leading"),
        "_class_name": "EulerDiscreteScheduler",
    },
    conditions={"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    reduced={
        "sample_size": 16,
        "block_out_channels": (16, 32, 64),
        "norm_num_groups": 16,
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    reduced_conditions={"encoder_hidden_states": (77, 32), "text_embeds": (24,), "time_ids": (6,)},
)

_DIT_XL_2 = Architecture(
    key="dit-xl-2",
    title="DiT-XL/2",
    source="facebook/DiT-XL-2-256 transformer/config.json",
    class_name="DiTTransformer2DModel",
    config={
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
    scheduler=_ddpm(1e-4, 0.02, "linear"),
    labels=1000,
    reduced={"sample_size": 16, "num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 16},
)

ARCHITECTURES: Mapping[str, Architecture] = {
    a.key: a
    for a in (_DDIM_CIFAR10, _LDM_BEDROOMS, _LDM_CHURCHES, _LDM_IMAGENET, _SD_15, _SD_21, _SDXL, _DIT_XL_2)
}  # fmt: skip


def twin(full: Architecture, width: int = 1) -> Architecture:
    """The reduced-width twin of a published architecture.

    Args:
        width: multiplies the twin's channels per level; 1 gives 0.5 to 4 million parameters.
    """
    config = {**full.config, **full.reduced}
    if width != 1:
        for name in ("block_out_channels", "num_attention_heads"):
            value = full.reduced.get(name)
            if value is not None:
                config[name] = tuple(width * v for v in value) if isinstance(value, tuple) else width * value
    return Architecture(
        key=full.key,
        title=f"{full.title} (twin)",
        source=full.source,
        class_name=full.class_name,
        config=config,
        scheduler=full.scheduler,
        conditions=full.reduced_conditions,
        labels=full.labels,
        heads=full.reduced_heads if full.heads is not None else None,
    )


def build(architecture: Architecture, seed: int = 0) -> nn.Module:
    """The network with random weights, in evaluation mode.

    Args:
        seed: of the weights; torch's own generator is left as it was.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, architecture.class_name)(**architecture.config).eval()
    if architecture.heads is not None:
        set_heads(model, architecture.heads)
    assert isinstance(model, nn.Module)
    return model


def set_heads(model: nn.Module, heads: int) -> None:
    """Give every attention of a diffusers model the same number of heads, whatever its channels."""
    from diffusers.models.attention_processor import Attention

    for module in model.modules():
        if isinstance(module, Attention):
            module.heads = heads
            module.scale = (module.inner_dim // heads) ** -0.5
