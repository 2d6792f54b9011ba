"""Checkpoints in their authors' layouts: the converted network computes what the authors' code computes."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.families.architectures import ARCHITECTURES
from edadm_compile.errors import InputError
from edadm_compile.frontend import LoadOptions, Source, load_source
from edadm_compile.frontend.original_openai import convert, layout_of, settings_of
from edadm_compile.frontend.original_settings import Settings
from edadm_compile.frontend.torch_file import read_torch_file
from tests.models.original_ddim import Model
from tests.models.original_openai import UNetModel

T = torch.tensor([3, 777])


def randomised(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A network of which no bias is zero and no norm the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = build(*args, **kwargs).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                norm = name.endswith("weight")
                parameter.normal_(1.0 if norm else 0.0, 0.3)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def assert_same(source: Source, original: nn.Module, inputs: tuple[Any, ...], *conditions: Tensor) -> None:
    """Equal up to the rounding of float32."""
    with torch.no_grad():
        expected = original(*inputs)
    found = source.denoiser()(inputs[0], inputs[1], *conditions)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def refused(path: Path, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_source(path, LoadOptions(**options))
    for word in words:
        assert word in str(caught.value)


# --- ermongroup/ddim, pesser/pytorch_diffusion

DDIM = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (16,), "resolution": 32}


def test_the_layout_of_ddim(tmp_path: Path) -> None:
    model = randomised(Model, **DDIM)
    torch.save(model.state_dict(), tmp_path / "ema_cifar10.ckpt")
    source = load_source(tmp_path / "ema_cifar10.ckpt", LoadOptions(steps=4))
    assert source.signature.inputs[0].shape == (3, 32, 32) and source.signature.source == "UNet2DModel"
    scheduler = source.sampler.scheduler
    assert (scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]) == ("linear", 1e-4, 2e-2)
    assert source.origin["layout"] == "ddim" and source.origin["weights"] == "last"
    assert_same(source, model, (noise(2, 3, 32, 32), T))


def test_the_training_file_of_ddim_gives_its_average(tmp_path: Path) -> None:
    """model, optimizer, epoch, step, average; the model was wrapped for several GPUs."""
    last, average = randomised(Model, **DDIM, seed=1), randomised(Model, **DDIM, seed=2)
    wrapped = {f"module.{name}": value for name, value in last.state_dict().items()}
    torch.save([wrapped, {"state": {}}, 7, 1000, dict(average.state_dict())], tmp_path / "ckpt.pth")
    source = load_source(tmp_path / "ckpt.pth", LoadOptions(steps=4))
    assert source.origin["weights"] == "average"
    assert_same(source, average, (noise(2, 3, 32, 32), T))
    torch.save([wrapped, {"state": {}}, 7, 1000], tmp_path / "ckpt.pth")
    source = load_source(tmp_path / "ckpt.pth", LoadOptions(steps=4))
    assert source.origin["weights"] == "last"
    assert_same(source, last, (noise(2, 3, 32, 32), T))


def test_ddim_without_convolutions_between_levels(tmp_path: Path) -> None:
    state = {k: v for k, v in Model(**DDIM).state_dict().items() if "sample.conv" not in k}
    torch.save(state, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "resamp_with_conv", "--factory")


# --- OpenAI and CompVis

SMALL = {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
PLAIN = {
    "LDM-4": ({"attention_resolutions": (2, 4), "channel_mult": (1, 2, 3), "num_head_channels": 32}, Settings(head_channels=32)),
    "LDM-8": (
        {"attention_resolutions": (1, 2), "channel_mult": (1, 2, 4), "num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True},
        Settings(heads=8),
    ),
    "improved-diffusion": (
        {"out_channels": 6, "num_res_blocks": 2, "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 4, "use_scale_shift_norm": True},
        Settings(heads=4),
    ),
    "new attention order": (
        {"attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 4, "use_new_attention_order": True},
        Settings(heads=4, new_attention_order=True),
    ),
    "one level": ({"attention_resolutions": (1,), "channel_mult": (1,), "num_heads": 2}, Settings(heads=2)),
}  # fmt: skip


def yaml_of(settings: Settings) -> str:
    """A flat file with the keyword arguments of OpenAI's code."""
    heads = f"num_heads: {settings.heads or -1}\nnum_head_channels: {settings.head_channels or -1}\n"
    return f"{heads}use_new_attention_order: {settings.new_attention_order}\nimage_size: 16\n"


SCHEDULER = '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}'


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "scheduler_config.json").write_text(SCHEDULER)
    return tmp_path


@pytest.mark.parametrize("name", PLAIN)
def test_self_attention_alone(place: Path, name: str) -> None:
    kind, settings = PLAIN[name]
    model = randomised(UNetModel, **{**SMALL, **kind})
    torch.save(model.state_dict(), place / "model.pt")
    (place / "flags.yaml").write_text(yaml_of(settings))
    source = load_source(place / "model.pt", LoadOptions(steps=4, original_config=place / "flags.yaml"))
    assert source.signature.inputs[0].shape == (3, 16, 16)
    assert_same(source, model, (noise(2, 3, 16, 16), T))


def test_guided_diffusion_with_class_labels(place: Path) -> None:
    kind = {"out_channels": 6, "attention_resolutions": (2,), "channel_mult": (1, 2), "num_head_channels": 16}
    model = randomised(UNetModel, **{**SMALL, **kind}, use_scale_shift_norm=True, resblock_updown=True, num_classes=7)
    torch.save(model.state_dict(), place / "model.pt")
    (place / "config.yaml").write_text("num_head_channels: 16\nimage_size: 8\n")  # beside the file: found
    source = load_source(place / "model.pt", LoadOptions(steps=4))
    assert source.signature.conditions[0].num_classes == 7
    labels = torch.tensor([6, 0])
    assert_same(source, model, (noise(2, 3, 8, 8), T, None, labels), labels)


CROSS = {
    "Stable Diffusion 1": {"attention_resolutions": (1, 2), "channel_mult": (1, 2, 2), "num_heads": 4},
    "Stable Diffusion 2": {
        "attention_resolutions": (1, 2), "channel_mult": (1, 2, 2), "num_head_channels": 16, "use_linear_in_transformer": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention(place: Path, name: str) -> None:
    kind = CROSS[name]
    model = randomised(UNetModel, **SMALL, **kind, transformer_depth=1, context_dim=12)
    latent = {f"model.diffusion_model.{k}": v for k, v in model.state_dict().items()}
    save_file({**latent, "first_stage_model.decoder.weight": torch.zeros(2)}, place / "model.safetensors")
    save_file({"encoder_hidden_states": torch.randn(4, 5, 12)}, place / "text.safetensors")
    (place / "flags.yaml").write_text("".join(f"{k}: {v}\n" for k, v in kind.items() if k.startswith("num_")))
    options = LoadOptions(
        steps=4, shape=(3, 8, 8), original_config=place / "flags.yaml", conditions=place / "text.safetensors"
    )
    text = noise(2, 5, 12)
    assert_same(load_source(place / "model.safetensors", options), model, (noise(2, 3, 8, 8), T, text), text)


# --- CompVis' training files

LATENT = {**SMALL, "attention_resolutions": (2,), "channel_mult": (1, 2), "num_heads": 1, "transformer_depth": 1, "context_dim": 12}  # fmt: skip
CONFIG = """
model:
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    timesteps: 1000
    image_size: 8
    parameterization: v
    unet_config:
      params: {image_size: 32, num_heads: 1}
"""


def average_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As CompVis' LitEma registers them: a buffer's name cannot have dots."""
    return {"model_ema." + f"diffusion_model.{name}".replace(".", ""): value for name, value in state.items()}


@pytest.fixture
def training_file(tmp_path: Path) -> tuple[Path, nn.Module, Tensor]:
    """A class-conditional latent diffusion model as PyTorch Lightning saves it, its trainer's objects included."""
    last, average = randomised(UNetModel, **LATENT, seed=1), randomised(UNetModel, **LATENT, seed=2)
    table = noise(1001, 12)
    state = {f"model.diffusion_model.{k}": v for k, v in last.state_dict().items()}
    state |= {**average_names(average.state_dict()), "model_ema.decay": torch.tensor(0.9999)}
    state |= {"cond_stage_model.embedding.weight": table, "first_stage_model.decoder.conv_in.weight": torch.zeros(3)}
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module: Any = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    packages = {"pytorch_lightning": types.ModuleType("pytorch_lightning"), name: module}
    packages["pytorch_lightning.callbacks"] = types.ModuleType("pytorch_lightning.callbacks")
    sys.modules.update(packages)
    try:
        extra = {"callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint()}}, "global_step": 7}
        torch.save({"state_dict": state, **extra}, tmp_path / "model.ckpt")
    finally:
        for package in packages:
            del sys.modules[package]
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path / "model.ckpt", average, table


def test_a_class_conditional_latent_model(training_file: tuple[Path, nn.Module, Tensor]) -> None:
    path, average, table = training_file
    source = load_source(path, LoadOptions(steps=4))
    assert source.origin["weights"] == "average"
    assert [s.name for s in source.signature.inputs] == ["sample", "timestep", "class_labels"]
    assert source.signature.inputs[0].shape == (3, 8, 8) and source.signature.output == "sample"
    scheduler = source.sampler.scheduler
    assert (scheduler["beta_schedule"], scheduler["beta_end"]) == ("scaled_linear", 0.0195)
    assert (scheduler["prediction_type"], scheduler["steps_offset"]) == ("v_prediction", 1)
    labels = torch.tensor([1000, 3])
    assert_same(source, average, (noise(2, 3, 8, 8), T, table[labels][:, None]), labels)
    from edadm_compile.frontend import GuidanceOptions

    guided = load_source(path, LoadOptions(steps=4, guidance=GuidanceOptions(3.0)))
    assert guided.sampler.null[0] is not None and int(guided.sampler.null[0]) == 1000  # CompVis' label of no class


def test_an_average_that_is_not_whole(training_file: tuple[Path, nn.Module, Tensor]) -> None:
    path = training_file[0]
    value = dict(read_torch_file(path))
    value["state_dict"] = {k: v for k, v in value["state_dict"].items() if k != "model_ema.diffusion_modelout2bias"}
    cut = path.with_name("cut.ckpt")  # another file: the tensors of the first are mapped from it
    torch.save({"state_dict": value["state_dict"]}, cut)
    refused(cut, "lacks 1 of", "model_ema.diffusion_modelout2bias")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('code of the file ran')",))


def test_a_training_file_with_more_than_a_trainers_objects(place: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Evil()}, place / "model.ckpt")
    refused(place / "model.ckpt", "pickled Python object", "--trust-pickle")


@pytest.mark.parametrize("layout", ["ddim", "openai"])
def test_a_first_level_wider_than_the_first_convolution(place: Path, layout: str) -> None:
    kind = {**SMALL, "attention_resolutions": (1,), "channel_mult": (2, 2), "num_heads": 1}
    model = UNetModel(**kind) if layout == "openai" else Model(**{**DDIM, "ch_mult": (2, 2)})
    torch.save(model.state_dict(), place / "model.pt")
    (place / "config.yaml").write_text("num_heads: 1\n")
    refused(place / "model.pt", "first level has 64 channels, its first convolution 32", "--factory")


def test_heads_that_nobody_names(place: Path) -> None:
    kind, _ = PLAIN["LDM-4"]
    torch.save(UNetModel(**{**SMALL, **kind}).state_dict(), place / "model.pt")
    refused(place / "model.pt", "number of attention heads", "--original-config")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ("cannot be read as YAML",)),
        ("- 1", ("holds a list",)),
        ("model: {params: {}}", ("not a configuration of a known kind", "unet_config")),
        ("speed: 3", ("neither heads nor image_size",)),
    ],
)
def test_a_yaml_file_of_something_else(place: Path, text: str, words: tuple[str, ...]) -> None:
    torch.save(randomised(Model, **DDIM).state_dict(), place / "model.ckpt")
    (place / "x.yaml").write_text(text)
    refused(place / "model.ckpt", *words, original_config=place / "x.yaml")


def test_the_yaml_file_of_ddim(tmp_path: Path) -> None:
    torch.save(randomised(Model, **DDIM).state_dict(), tmp_path / "model.ckpt")
    (tmp_path / "celeba.yml").write_text(
        "data: {image_size: 64}\nmodel: {ch: 32}\n"
        "diffusion: {beta_schedule: quad, beta_start: 0.001, beta_end: 0.03, num_diffusion_timesteps: 500}\n"
    )
    source = load_source(tmp_path / "model.ckpt", LoadOptions(steps=4, original_config=tmp_path / "celeba.yml"))
    assert source.signature.inputs[0].shape == (3, 64, 64)
    assert source.sampler.scheduler["beta_schedule"] == "scaled_linear"
    assert source.sampler.scheduler["num_train_timesteps"] == 500


# --- the published models in full size, without their memory

PUBLISHED: dict[str, dict[str, Any]] = {
    "ldm4-bedrooms": {"in_channels": 3, "model_channels": 224, "out_channels": 3, "attention_resolutions": (8, 4, 2), "channel_mult": (1, 2, 3, 4),
                      "num_head_channels": 32},
    "ldm8-churches": {"in_channels": 4, "model_channels": 192, "out_channels": 4, "attention_resolutions": (1, 2, 4, 8), "channel_mult": (1, 2, 2, 4, 4),
                      "num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True},
    "ldm4-imagenet": {"in_channels": 3, "model_channels": 192, "out_channels": 3, "attention_resolutions": (8, 4, 2), "channel_mult": (1, 2, 3, 5),
                      "num_heads": 1, "transformer_depth": 1, "context_dim": 512},
    "sd-1.5": {"in_channels": 4, "model_channels": 320, "out_channels": 4, "attention_resolutions": (4, 2, 1), "channel_mult": (1, 2, 4, 4),
               "num_heads": 8, "transformer_depth": 1, "context_dim": 768},
    "sd-2.1": {"in_channels": 4, "model_channels": 320, "out_channels": 4, "attention_resolutions": (4, 2, 1), "channel_mult": (1, 2, 4, 4),
               "num_head_channels": 64, "transformer_depth": 1, "context_dim": 1024, "use_linear_in_transformer": True},
    "sdxl": {"in_channels": 4, "model_channels": 320, "out_channels": 4, "attention_resolutions": (4, 2), "channel_mult": (1, 2, 4),
             "num_head_channels": 64, "transformer_depth": (1, 2, 10), "context_dim": 2048, "use_linear_in_transformer": True,
             "num_classes": "sequential", "adm_in_channels": 2816},
}  # fmt: skip


def per_level(heads: Any) -> list[int]:
    return list(heads) if isinstance(heads, (list, tuple)) else [heads] * 4


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_published_model_is_recognised_and_fits(key: str) -> None:
    """Every tensor of the authors' network has its place, of its shape, in the diffusers class of `ARCHITECTURES`."""
    import diffusers

    architecture = ARCHITECTURES[key]
    with torch.device("meta"):
        state = UNetModel(num_res_blocks=2, **PUBLISHED[key]).state_dict()
        expected = getattr(diffusers, architecture.class_name)(**architecture.config).state_dict()
        layout = layout_of(dict(state), key)
        settings = settings_of(layout, None, key)
        class_name, config, converted = convert(layout, settings)
        built = getattr(diffusers, class_name)(**config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in converted.items()}
    assert shapes == {name: tuple(value.shape) for name, value in expected.items()}
    assert shapes == {name: tuple(value.shape) for name, value in built.items()}
    assert class_name == architecture.class_name and config["layers_per_block"] == 2
    if architecture.heads is not None:
        assert settings.heads == architecture.heads
    else:
        assert per_level(config["attention_head_dim"]) == per_level(architecture.config["attention_head_dim"])
    if settings.scheduler is not None:  # Stable Diffusion 2 exists with two kinds of prediction
        same = ("beta_start", "beta_end", "beta_schedule", "_class_name")
        assert [settings.scheduler[n] for n in same] == [architecture.scheduler[n] for n in same]
        assert config["sample_size"] == architecture.config["sample_size"]
