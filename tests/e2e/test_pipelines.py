"""Compiled UNets in diffusers' own pipelines, which are not told that anything changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import edadm_compile
from edadm_compile.cli import main
from edadm_compile.errors import InputError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.frontend.autoencoder import Decoder
from tests.models.pipelines import autoencoder, stable_diffusion, stable_diffusion_xl

STEPS = 3
#: Round to nearest at high widths: enough to tell the right conditions from wrong ones, and quick.
QUICK = ["--weights-bits", "8", "--acts-bits", "16", "--iters", "0", "--calib-samples", "8", "--steps", str(STEPS),
         "--targets", "none", "--json"]  # fmt: skip


def run(*arguments: Any) -> dict[str, Any]:
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def latents(pipe: Any, prompt: str, guidance: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = pipe(prompt, num_inference_steps=STEPS, guidance_scale=guidance, generator=generator, output_type="latent")
    return torch.as_tensor(images.images)


def compare(pipe: Any, file: Path, guidance: float) -> None:
    """The same images as with the float UNet; and those of another prompt are far from them."""
    original = pipe.unet
    float_cat, float_sea, float_none = (latents(pipe, p, guidance) for p in ("a cat", "the sea", ""))
    pipe.unet = edadm_compile.load(file)
    cat, sea = latents(pipe, "a cat", guidance), latents(pipe, "the sea", guidance)
    pipe.unet = original
    assert sqnr(float_cat - float_none, cat - float_none) > 20  # dB; what the prompt changes is there
    assert sqnr(float_sea - float_none, sea - float_none) > 20
    assert sqnr(float_cat - float_none, sea - float_none) < 5  # another prompt, another image


def test_stable_diffusion(tmp_path: Path) -> None:
    """From the pipeline's folder with prompts, guided, to a file in its place; v prediction as in 2.x."""
    pipe = stable_diffusion(tmp_path / "sd", "v_prediction")
    (tmp_path / "prompts.txt").write_text("a cat\nthe sea\nred\n")
    given = [tmp_path / "sd", "--prompts", tmp_path / "prompts.txt"]
    run(*given, "--guidance", "4", *QUICK, "-o", tmp_path / "unet.qmod")
    compare(pipe, tmp_path / "unet.qmod", 4.0)
    pictures = [tmp_path / "sd", "--prompts", tmp_path / "prompts.txt", "--decode"]
    drawn = run("sample", tmp_path / "unet.qmod", "-n", 2, "--reference", *pictures, "-o", tmp_path / "x.png", "--json")
    assert drawn["guidance"] == 4.0 and drawn["psnr_db"]["worst"] > 25
    assert picture_size(tmp_path / "x.png") == (18, 4 * 18)  # two pairs of images of 16 pixels, with a frame


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl(tmp_path / "xl")
    (tmp_path / "prompts.txt").write_text("a cat\nthe sea\nred\n")
    given = [tmp_path / "xl", "--prompts", tmp_path / "prompts.txt"]
    made = run(*given, "--guidance", "4", *QUICK, "-o", tmp_path / "unet.qmod")
    assert made["model"]["class"] == "UNet2DConditionModel"
    assert not any(name.startswith("unet.") for name in made["float_layers"])
    compare(pipe, tmp_path / "unet.qmod", 4.0)
    model = edadm_compile.load(tmp_path / "unet.qmod")
    assert model.add_embedding.linear_1.in_features == 36 and model.config.addition_embed_type == "text_time"
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 9, 32)
    added = {"text_embeds": torch.zeros(1, 12), "time_ids": torch.zeros(1, 6)}
    for dtype in (torch.float16, torch.float32):
        arguments = {"encoder_hidden_states": text, "added_cond_kwargs": added, "cross_attention_kwargs": None}
        out = model(x.to(dtype), torch.tensor(1.0), timestep_cond=None, **arguments)
        assert out.sample.dtype == dtype and out[0].shape == x.shape
    with pytest.raises(InputError, match=r"'added_cond_kwargs.image_embeds' was not compiled in"):
        model(x, 1.0, text, added_cond_kwargs={**added, "image_embeds": x})
    with pytest.raises(InputError, match="'time_ids' is missing"):
        model(x, 1.0, text, added_cond_kwargs={"text_embeds": added["text_embeds"]})


def test_unconditional_pipelines(tmp_path: Path) -> None:
    """DDPM in pixels and latent diffusion with a VQ autoencoder, one UNet in both."""
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
            down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=4,
        ).eval()  # fmt: skip
        vae = autoencoder("VQModel")
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vqvae")
    DDIMScheduler(num_train_timesteps=100).save_pretrained(tmp_path / "scheduler")
    run(tmp_path, *QUICK, "-o", tmp_path / "unet.qmod")
    pipelines: dict[str, Callable[[], Any]] = {
        "pixels": lambda: DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=100)),
        "latents": lambda: LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler(num_train_timesteps=100)),
    }
    for make in pipelines.values():
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        images = []
        for model in (unet, edadm_compile.load(tmp_path / "unet.qmod")):
            pipe.unet = model
            generator = torch.Generator().manual_seed(2)
            made = pipe(batch_size=2, num_inference_steps=STEPS, generator=generator, output_type="np").images
            images.append(torch.as_tensor(made))
        assert images[0].shape == images[1].shape and 0 < float((images[0] - images[1]).abs().max()) < 0.1
    drawn = run("sample", tmp_path / "unet.qmod", "-n", 1, "--pipeline", tmp_path, "--decode", "-o", tmp_path / "x.png", "--json")  # fmt: skip
    assert drawn["count"] == 1 and picture_size(tmp_path / "x.png") == (18, 18)


def test_decoding(tmp_path: Path) -> None:
    """As the pipelines do: unscaled, in slices; what cannot decode is refused."""
    vae = autoencoder()
    vae.save_pretrained(tmp_path / "vae")
    z = torch.randn(5, 4, 3, 3)
    with torch.no_grad():
        expected = vae.decode(z / vae.config.scaling_factor).sample
    found = Decoder(tmp_path / "vae")(z)
    assert found.shape == (5, 3, 6, 6) and float((found - expected).abs().max()) < 1e-5
    with pytest.raises(InputError, match="decodes latents of 4 channels, the model makes 3"):
        Decoder(tmp_path / "vae")(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="no configuration of an autoencoder"):
        Decoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(InputError, match="holds a UNet2DModel, supported are AutoencoderKL"):
        Decoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no \.safetensors weights"):
        Decoder(tmp_path)
