"""diffusers pipelines of tiny random parts: text encoders, a tokenizer of single letters, UNets, autoencoders."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

#: Tokens of a prompt, the two ends included.
TOKENS = 9
WIDTH = 16
_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (8,),  # one level: upsampling makes the capture three times as long
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "attention_head_dim": 2,
}
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer with a vocabulary of letters and no merges."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(projected: bool = False) -> Any:
    """CLIP's text encoder; `projected` with the pooled output of SDXL's second one."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=12, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    for parameter in model.parameters():  # the default is so small that prompts hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def autoencoder(kind: str = "AutoencoderKL") -> Any:
    """Images of twice the size of the latents."""
    import diffusers

    channels = {"latent_channels": 4, "block_out_channels": (8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    extra = {"num_vq_embeddings": 16} if kind == "VQModel" else {}
    return getattr(diffusers, kind)(**channels, **blocks, **extra).eval()


def conditioned_unet(loudness: float, **changes: Any) -> Any:
    """A UNet that hears its text: cross-attention with weights of this standard deviation."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**{**_UNET, "cross_attention_dim": WIDTH, **changes}).eval()
    for name, parameter in model.named_parameters():
        if "attn2" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=loudness)
    return model


def stable_diffusion(folder: Path, prediction: str = "epsilon") -> Any:
    """A `StableDiffusionPipeline`, also written to `folder`."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {"vae": autoencoder(), "text_encoder": text_encoder(), "unet": conditioned_unet(0.5)}
    scheduler = DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)
    pipe = StableDiffusionPipeline(
        **parts, tokenizer=tokenizer(folder / "words"), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return _written(pipe, folder)


def stable_diffusion_xl(folder: Path) -> Any:
    """A `StableDiffusionXLPipeline`, also written to `folder`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = conditioned_unet(
            0.2, cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4, use_linear_projection=True, transformer_layers_per_block=(2,),
        )  # fmt: skip
        parts = {"vae": autoencoder(), "text_encoder": text_encoder(), "text_encoder_2": text_encoder(projected=True)}
    words = {"tokenizer": tokenizer(folder / "words"), "tokenizer_2": tokenizer(folder / "words_2")}
    scheduler = EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading")
    return _written(StableDiffusionXLPipeline(**parts, **words, unet=unet, scheduler=scheduler), folder)


def _written(pipe: Any, folder: Path) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(folder)
    return pipe
