"""Everything a user can get wrong about a model file: one sentence that says what it is and what to do."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm_compile.errors import InputError
from edadm_compile.frontend import LoadOptions, Source, load_source, source_from_module
from edadm_compile.frontend.checkpoint import FORMAT
from edadm_compile.ir.program import SamplerSpec
from tests.models.foreign import SIZE, build, build_with_labels

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear"}
FACTORY = "tests.models.foreign:build"
UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [8, 8], "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"], "add_attention": False,
}  # fmt: skip
IMPOSSIBLE = {**UNET, "down_block_types": ["Nothing", "Nothing"]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a scheduler configuration."""
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path


def refused(path: Path, *words: str, **options: Any) -> str:
    """The sentence with which a path is refused; it must hold all `words`."""
    with pytest.raises(InputError) as caught:
        load_source(path, LoadOptions(**options))
    message = str(caught.value)
    for word in words:
        assert word in message
    assert len(message) < 700 and "\n" not in message
    return message


@pytest.fixture(scope="module")
def diffusers_unet() -> nn.Module:
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = UNet2DModel(**UNET)
    return model


# --- files that are no models


def test_a_missing_path(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.pt", "nothing.pt does not exist")


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x00" * 100], ids=["empty", "text", "zeros"])
def test_a_file_of_something_else(place: Path, content: bytes) -> None:
    (place / "model.pt").write_bytes(content)
    refused(place / "model.pt", "not a model file", "neither a torch file")


def test_a_zip_of_something_else(place: Path) -> None:
    import zipfile

    with zipfile.ZipFile(place / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(place / "model.pt", "not a model file")


def test_a_truncated_torch_file(place: Path) -> None:
    torch.save(build().state_dict(), place / "whole.pt")
    (place / "model.pt").write_bytes((place / "whole.pt").read_bytes()[:3000])
    refused(place / "model.pt", "damaged torch file", "its end is missing")
    refused(place / "model.pt", "damaged torch file", factory=FACTORY)


def test_a_list(place: Path) -> None:
    torch.save([1, 2], place / "model.pt")
    refused(place / "model.pt", "holds a list, not a model", ".pt2")


# --- pickles


def test_a_pickled_module_is_refused_with_three_safe_ways(place: Path) -> None:
    torch.save(build(), place / "model.pt")
    message = refused(
        place / "model.pt",
        "pickled Python object",
        "can run any code",
        "torch.export.save",
        "--factory",
        "save_pretrained",
        "--trust-pickle",
    )
    assert all(f"({n})" in message for n in (1, 2, 3))


def test_a_pickled_module_is_never_opened_unasked(place: Path) -> None:
    torch.save(Trap(place / "opened"), place / "model.pt")
    refused(place / "model.pt", "pickled Python object")
    refused(place / "model.pt", "pickled Python object", factory=FACTORY)
    assert not (place / "opened").exists()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_trusted_pickled_module_is_loaded(place: Path) -> None:
    torch.save(build(), place / "model.pt")
    source = load_source(place / "model.pt", LoadOptions(trust_pickle=True, steps=3))
    assert source.signature.inputs[0].shape == (3, SIZE, SIZE) and source.signature.inputs[1].dtype == torch.int64
    assert (
        source.sampler.steps == 3
        and source.provenance()["class"] == "ForeignUNet"
        and len(source.origin["sha256"]) == 64
    )


def test_a_trusted_pickle_that_fails_says_why(place: Path) -> None:
    (place / "model.pt").write_bytes(b"\x80\x04cno_such_module\nThing\n.")
    refused(place / "model.pt", "cannot be unpickled", "no_such_module", trust_pickle=True)


# --- state dicts and factories


def test_a_bare_state_dict_needs_a_factory(place: Path) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    refused(place / "model.pt", "bare state dict", "--factory package.module:callable")
    save_file(build().state_dict(), place / "model.safetensors")
    refused(place / "model.safetensors", "holds only tensors", "--factory package.module:callable")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("tests.models.foreign", ("expected package.module:callable",)),
        ("tests.no_such_module:build", ("ModuleNotFoundError", "tests.no_such_module")),
        ("tests.models.foreign:no_such_function", ("AttributeError", "no_such_function")),
        ("tests.models.foreign:build_nothing", ("returned str", "torch.nn.Module")),
        ("tests.models.foreign:build_and_fail", ("RuntimeError", "no weights on this planet")),
    ],
    ids=["no colon", "no such module", "no such function", "returns a string", "raises"],
)
def test_a_factory_that_gives_no_module(place: Path, factory: str, words: tuple[str, ...]) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    refused(place / "model.pt", "--factory", *words, factory=factory)


def test_a_factory_is_found_from_the_current_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "their_own_model.py").write_text("from tests.models.foreign import build\n")
    torch.save(build().state_dict(), place / "model.pt")
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert load_source(place / "model.pt", LoadOptions(factory="their_own_model:build", steps=2)).module is not None


def test_tensors_missing_in_the_file(place: Path) -> None:
    state = build().state_dict()
    del state["head.weight"]
    torch.save({**state, "heads.weight": torch.zeros(1)}, place / "model.pt")
    refused(place / "model.pt", "lacks 1 tensor(s)", "'head.weight'", "heads.weight", factory=FACTORY)


def test_tensors_the_module_has_no_place_for(place: Path) -> None:
    torch.save({**build().state_dict(), "third_level.weight": torch.zeros(1)}, place / "model.pt")
    refused(place / "model.pt", "no place for", "third_level.weight", factory=FACTORY)


def test_tensors_of_another_shape(place: Path) -> None:
    torch.save({**build().state_dict(), "head.weight": torch.zeros(4, 8, 3, 3)}, place / "model.pt")
    refused(place / "model.pt", "does not fit", "head.weight", "[4, 8, 3, 3]", factory=FACTORY)


def test_a_file_without_a_state_dict(place: Path) -> None:
    torch.save({"epoch": 3}, place / "model.pt")
    refused(place / "model.pt", "holds no state dict", factory=FACTORY)
    (place / "model.safetensors").write_bytes(b"not at all")
    refused(place / "model.safetensors", "not a safetensors file", factory=FACTORY)


def test_the_models_part_of_a_trainers_file_is_found_by_its_prefix(place: Path) -> None:
    state = build().state_dict()
    torch.save(
        {**{f"model.diffusion_model.{k}": v for k, v in state.items()}, "betas": torch.zeros(4)}, place / "model.pt"
    )
    module = load_source(place / "model.pt", LoadOptions(factory=FACTORY, steps=2)).module
    assert module is not None and all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_two_copies_of_the_weights_are_not_guessed_between(place: Path) -> None:
    state = build().state_dict()
    torch.save({f"{p}.{k}": v for p in ("model", "ema") for k, v in state.items()}, place / "model.pt")
    refused(place / "model.pt", "lacks", "'model.", factory=FACTORY)


# --- the sampler


def test_an_unknown_sampler(tmp_path: Path) -> None:
    torch.save(build().state_dict(), tmp_path / "model.pt")
    refused(
        tmp_path / "model.pt",
        "the sampler is unknown",
        "--scheduler scheduler_config.json",
        "DDIMScheduler",
        factory=FACTORY,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot read scheduler file",)),
        ("{", ("is not JSON",)),
        ("[]", ("no _class_name",)),
        ('{"_class_name": "Sampler"}', ("_class_name 'Sampler'", "DDPMScheduler")),
        ('{"_class_name": "DDIMScheduler", "beta_schedule": "steep"}', ("refuses its configuration", "steep")),
    ],
    ids=["missing", "not json", "a list", "unknown class", "bad setting"],
)
def test_a_scheduler_file_that_cannot_be_used(place: Path, content: str | None, words: tuple[str, ...]) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    if content is not None:
        (place / "other.json").write_text(content)
    refused(place / "model.pt", *words, factory=FACTORY, scheduler=place / "other.json")


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_outside_the_schedule(place: Path, steps: int) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    refused(place / "model.pt", f"got {steps}, allowed 1 to 100", factory=FACTORY, steps=steps)


# --- shapes, signatures and conditions


class NoShape(nn.Module):
    """A module that says nothing about its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + t[:, None, None, None]


class OneArgument(NoShape):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.conv(x)


class ReturnsDict(NoShape):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return {"eps": super().forward(x, t)}


SAMPLER = SamplerSpec(SCHEDULER, 3)


def _rejected(module: nn.Module, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        source_from_module(module, SAMPLER, **options)
    for word in words:
        assert word in str(caught.value)


def test_a_shape_that_cannot_be_inferred() -> None:
    _rejected(NoShape(), "shape of NoShape cannot be inferred", "--shape C,H,W")


def test_a_shape_that_does_not_fit() -> None:
    _rejected(NoShape(), "NoShape cannot be called with x [2, 5, 8, 8]", "channels", shape=(5, 8, 8))


def test_a_forward_without_timestep() -> None:
    _rejected(OneArgument(), "takes 1 argument(s)", "forward(x, t, *conditions)", shape=(4, 8, 8))


def test_a_result_that_is_no_tensor() -> None:
    _rejected(ReturnsDict(), "the model returned dict", "a tensor, a tuple, or an object with .sample", shape=(4, 8, 8))


def test_a_condition_without_values() -> None:
    _rejected(build_with_labels(), "needs a condition 'y'", "--cond FILE.safetensors")


def test_a_condition_that_forward_does_not_take() -> None:
    _rejected(build_with_labels(), "condition 'z' is not a parameter", "x, t, y", conditions={"z": torch.zeros(4, 2)})


@pytest.mark.parametrize(
    ("content", "word"), [(b"nonsense", "not a readable safetensors file"), (None, "not a readable safetensors file")]
)
def test_a_condition_file_that_cannot_be_read(place: Path, content: bytes | None, word: str) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    if content is not None:
        (place / "c.safetensors").write_bytes(content)
    refused(place / "model.pt", "--cond", word, factory=FACTORY, conditions=place / "c.safetensors")


def test_a_condition_file_without_rows(place: Path) -> None:
    torch.save(build().state_dict(), place / "model.pt")
    save_file({"y": torch.zeros(0, 4)}, place / "c.safetensors")
    refused(place / "model.pt", "tensor 'y' has no rows", factory=FACTORY, conditions=place / "c.safetensors")


# --- exported programs


class Swapped(nn.Module):
    """The timestep first: not the calling convention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NoShape()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.inner(x, t)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archives")
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    x, t = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
    torch.export.save(torch.export.export(Swapped(), (t, x)), folder / "swapped.pt2")
    auto = torch.export.Dim.AUTO
    torch.export.save(
        torch.export.export(NoShape(), (x, t), dynamic_shapes=({0: auto}, {0: auto})), folder / "auto.pt2"
    )
    labelled, y = build_with_labels(), torch.zeros(2, dtype=torch.int64)
    torch.export.save(torch.export.export(labelled, (torch.zeros(2, 3, 8, 8), t, y)), folder / "labelled.pt2")
    return folder


def test_an_archive_with_other_inputs(archives: Path) -> None:
    refused(archives / "swapped.pt2", "inputs are t [2], x [2, 4, 8, 8]", "expected x [B, C, H, W], t [B]")


def test_an_archive_without_a_bound_on_its_batch(archives: Path) -> None:
    signature = load_source(archives / "auto.pt2", LoadOptions(steps=2)).signature
    assert signature.max_batch == 1024 and signature.min_batch <= 2


def test_an_archive_whose_condition_has_no_values(archives: Path) -> None:
    refused(archives / "labelled.pt2", "condition 'y'", "--cond FILE.safetensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"y": torch.zeros(3, 2)}, ("condition 'y' has rows of shape []", "gives [2]")),
        ({"y": torch.zeros(3), "z": torch.zeros(3)}, ("'z' is not an input", "x, t, y")),
    ],
    ids=["another shape", "an unknown name"],
)
def test_an_archive_with_conditions_that_do_not_fit(
    archives: Path, tmp_path: Path, tensors: dict[str, Tensor], words: tuple[str, ...]
) -> None:
    save_file(tensors, tmp_path / "c.safetensors")
    refused(archives / "labelled.pt2", *words, conditions=tmp_path / "c.safetensors")


def test_an_archive_that_is_damaged(archives: Path, tmp_path: Path) -> None:
    import zipfile

    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    with zipfile.ZipFile(archives / "auto.pt2") as whole, zipfile.ZipFile(tmp_path / "model.pt2", "w") as damaged:
        for name in whole.namelist():
            damaged.writestr(name, whole.read(name) if name.endswith("archive_format") else b"?")
    refused(tmp_path / "model.pt2", "torch.export archive that this torch", "cannot read")


# --- checkpoint dictionaries


def _checkpoint(unet: nn.Module, /, **changes: Any) -> dict[str, Any]:
    value = {
        "format": FORMAT,
        "model": {"class_name": "UNet2DModel", "config": UNET},
        "state_dict": unet.state_dict(),
        "scheduler": SCHEDULER,
        "sampler": {"steps": 7},
    }
    return {k: v for k, v in {**value, **changes}.items() if v is not None}


def test_a_checkpoint_dictionary(tmp_path: Path, diffusers_unet: nn.Module) -> None:
    torch.save(_checkpoint(diffusers_unet), tmp_path / "model.pt")
    source = load_source(tmp_path / "model.pt")
    assert source.sampler.steps == 7 and source.signature.output == "sample"
    _same_predictions(source, diffusers_unet)
    assert load_source(tmp_path / "model.pt", LoadOptions(steps=3)).sampler.steps == 3


def _same_predictions(source: Source, model: nn.Module) -> None:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 60])
    with torch.no_grad():
        torch.testing.assert_close(source.denoiser()(x, t), model.eval()(x, t).sample)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "edadm_compile.checkpoint/9"}, ("checkpoint/9", f"reads '{FORMAT}'")),
        ({"model": None}, ("no dictionary 'model'",)),
        ({"state_dict": [1]}, ("no dictionary 'state_dict'",)),
        ({"scheduler": [1]}, ("no dictionary 'scheduler'",)),
        ({"sampler": [1]}, ("no dictionary 'sampler'",)),
        ({"scheduler": None}, ("the sampler is unknown", "--scheduler")),
        ({"sampler": {"steps": 1000}}, ("got 1000, allowed 1 to 100",)),
        ({"model": {"class_name": "MyUNet", "config": {}}}, ("'MyUNet'", "UNet2DModel", ".pt2", "--factory")),
        ({"model": {"class_name": "UNet2DModel", "config": [1]}}, ("no dictionary 'config'",)),
        ({"model": {"class_name": "UNet2DModel", "config": IMPOSSIBLE}}, ("refuses its configuration", "Nothing")),
        ({"state_dict": {"conv_in.weight": torch.zeros(8, 3, 3, 3)}}, ("weights do not fit", "Missing key")),
        ({"state_dict": {"conv_in.weight": 3}}, ("'conv_in.weight' is a int", "tensors only")),
    ],
    ids=[
        "another version", "no model", "no state dict", "a scheduler that is a list", "a sampler that is a list", "no scheduler", "too many steps",
        "an unknown class", "a configuration that is a list", "an impossible configuration", "missing tensors", "an entry that is no tensor",
    ],
)  # fmt: skip
def test_a_checkpoint_dictionary_with_an_entry_that_is_wrong(
    tmp_path: Path, diffusers_unet: nn.Module, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    torch.save(_checkpoint(diffusers_unet, **changes), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", *words)


def test_a_text_conditioned_model_needs_its_text(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "cross_attention_dim": 6,
        "attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    model = UNet2DConditionModel(**config)
    torch.save(
        _checkpoint(model, model={"class_name": "UNet2DConditionModel", "config": config}), tmp_path / "model.pt"
    )
    refused(tmp_path / "model.pt", "needs text conditions", "encoder_hidden_states", "[N, tokens, 6]")


# --- diffusers folders


@pytest.fixture
def folder(tmp_path: Path, diffusers_unet: nn.Module) -> Path:
    """A folder written by diffusers itself, the scheduler beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers_unet.save_pretrained(tmp_path / "unet")  # type: ignore[operator]
    (tmp_path / "unet" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return tmp_path / "unet"


@pytest.mark.parametrize(
    "where",
    [".", "..", "scheduler", "../scheduler"],
    ids=["beside", "above", "in a folder", "in the pipeline's folder"],
)
def test_a_diffusers_folder_with_its_scheduler(folder: Path, diffusers_unet: nn.Module, where: str) -> None:
    target = folder / where
    target.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").rename(target / "scheduler_config.json")
    source = load_source(folder, LoadOptions(steps=4))
    assert source.sampler.scheduler == SCHEDULER and source.signature.inputs[0].shape == (3, 8, 8)
    _same_predictions(source, diffusers_unet)


def test_a_pipeline_folder(folder: Path, diffusers_unet: nn.Module) -> None:
    _same_predictions(load_source(folder.parent, LoadOptions(steps=4)), diffusers_unet)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "not a diffusers model", "config.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("config.json is not valid JSON",)),
        ("[1]", ("holds a list", "diffusers UNet")),
        ('{"_class_name": "AutoencoderKL"}', ("'AutoencoderKL'", "UNet2DModel")),
    ],
    ids=["not json", "a list", "another class"],
)
def test_a_folder_with_another_configuration(folder: Path, content: str, words: tuple[str, ...]) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, *words)


def test_a_folder_without_a_scheduler(folder: Path) -> None:
    (folder / "scheduler_config.json").unlink()
    refused(folder, "the sampler is unknown")


def test_a_folder_with_pickled_weights_only(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    refused(folder, "has no diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    refused(folder, "a .bin file is a pickle", "safe_serialization=True")


def test_a_folder_with_damaged_weights(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(folder, "not a readable safetensors file")


@pytest.mark.parametrize(
    "index", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"conv_in.weight": "part-1.safetensors"}}']
)
def test_a_folder_with_a_bad_index(folder: Path, index: str) -> None:
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    refused(folder, "part-1.safetensors" if "part-1" in index else "not a safetensors index")


def test_weights_in_several_files(folder: Path, diffusers_unet: nn.Module) -> None:
    state = diffusers_unet.state_dict()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({k: state[k] for k in keys}, folder / file)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {k: file for file, keys in halves.items() for k in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    _same_predictions(load_source(folder, LoadOptions(steps=4)), diffusers_unet)
