"""Prompts: encoded as diffusers' pipelines encode them, from a pipeline folder that is on the disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edadm_compile.errors import InputError
from edadm_compile.frontend import GuidanceOptions, LoadOptions, load_source
from edadm_compile.frontend.prompts import encode, pipeline_folder, read_prompts
from tests.models.pipelines import stable_diffusion, stable_diffusion_xl

PROMPTS = ["a cat", "blue sky and sea", "x"]  # the second is too long and is cut


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sd")
    return stable_diffusion(folder), folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("sdxl")
    return stable_diffusion_xl(folder), folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path / "prompts.txt"


def test_one_encoder_as_the_pipeline_encodes(sd: tuple[Any, Path]) -> None:
    pipe, folder = sd
    found = encode(folder, PROMPTS, None)
    expected, empty = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    assert torch.equal(found.conditions["encoder_hidden_states"], expected)
    assert torch.equal(found.null["encoder_hidden_states"], empty[:1])
    assert float((expected[0] - expected[2]).abs().max()) > 0.1  # prompts differ


@pytest.mark.parametrize("zeros", [True, False])
def test_two_encoders_as_the_pipeline_encodes(sdxl: tuple[Any, Path], zeros: bool) -> None:
    pipe, folder = sdxl
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    found = encode(folder, PROMPTS, (8, 6))
    expected, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS)
    assert torch.equal(found.conditions["encoder_hidden_states"], expected)
    assert torch.equal(found.conditions["text_embeds"], pooled)
    assert torch.equal(found.null["encoder_hidden_states"], empty[:1])
    # One row here, three equal ones there: the products are summed in another order.
    assert float((found.null["text_embeds"] - empty_pooled[:1]).abs().max()) < 1e-5
    assert bool((empty == 0).all()) == zeros
    ids = pipe._get_add_time_ids((16, 12), (0, 0), (16, 12), torch.float32, text_encoder_projection_dim=12)
    assert torch.equal(found.conditions["time_ids"], ids.repeat(3, 1)) and "time_ids" not in found.null


def test_a_source_with_prompts(sd: tuple[Any, Path], prompts: Path) -> None:
    pipe, folder = sd
    guided = GuidanceOptions(5.0)
    for path, pipeline in ((folder, None), (folder / "unet", None), (folder / "unet", folder)):
        source = load_source(path, LoadOptions(steps=4, prompts=prompts, pipeline=pipeline, guidance=guided))
        assert source.conditions["encoder_hidden_states"].shape == (3, 9, 16)
        empty = pipe.encode_prompt("", torch.device("cpu"), 1, False)[0][0]
        (null,) = source.sampler.null
        assert null is not None and torch.equal(null, empty)
    assert pipeline_folder(folder / "unet") == folder.resolve()


def test_the_autoencoder_is_not_opened(sd: tuple[Any, Path], prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    for part in ("unet", "scheduler", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(sd[1] / part)
    (folder / "vae").mkdir()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    source = load_source(folder, LoadOptions(steps=4, prompts=prompts))
    assert source.signature.inputs[0].shape == (4, 8, 8)


def refused(*words: str, **options: Any) -> None:
    path = options.pop("path")
    with pytest.raises(InputError) as caught:
        load_source(path, LoadOptions(steps=4, **options))
    for word in words:
        assert word in str(caught.value)


def test_what_is_missing(sd: tuple[Any, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sd[1]
    refused("needs text conditions", "--prompts", "--pipeline", path=folder)
    refused("text_encoder folder", "--pipeline", path=folder, prompts=prompts, pipeline=tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    refused("no prompt in it", path=folder, prompts=tmp_path / "empty.txt")
    refused("cannot be read", path=folder, prompts=tmp_path / "nothing.txt")
    save_file({"encoder_hidden_states": torch.zeros(2, 9, 16)}, tmp_path / "cond.safetensors")
    refused("both give", path=folder, prompts=prompts, conditions=tmp_path / "cond.safetensors")
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    refused("edadm-compile[text]", "--cond", path=folder, prompts=prompts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "text_encoder" / "model.safetensors").rename(f / "text_encoder" / "pytorch_model.bin"), ("no model.safetensors", "pickle")),
        (lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"x"), ("cannot be loaded",)),
        (lambda f: (f / "text_encoder" / "config.json").write_text('{"architectures": ["BertModel"]}'), ("is a BertModel", "CLIPTextModel")),
        (lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], ("not a CLIP tokenizer",)),
    ],
    ids=["pickled weights", "broken weights", "another encoder", "no tokenizer"],
)  # fmt: skip
def test_parts_that_cannot_be_used(
    sd: tuple[Any, Path], prompts: Path, tmp_path: Path, change: Any, words: tuple[str, ...]
) -> None:
    import shutil

    folder = tmp_path / "pipeline"
    shutil.copytree(sd[1], folder)
    change(folder)
    refused(*words, path=folder, prompts=prompts)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  a cat \n\nein Käse\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "ein Käse"]
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")
