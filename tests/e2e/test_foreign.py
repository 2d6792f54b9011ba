"""A UNet in nobody's style, through every door of the command line, to a file that behaves like the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm_compile.cli import main
from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver.compile import compile_model
from edadm_compile.errors import InputError
from edadm_compile.evaluate.contract import check_layers
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.report.truth import truth_table
from edadm_compile.runtime.artifact import Artifact, read
from edadm_compile.runtime.session import CompiledModel, from_artifact, load
from tests.models.foreign import SIZE, build, build_with_labels

SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear"}
SMALL = [
    "--steps",
    "3",
    "--calib-samples",
    "8",
    "--iters",
    "2",
    "--seed",
    "3",
    "--targets",
    "none",
    "--json",
    "--debug",
]
FACTORY = ["--factory", "tests.models.foreign:build"]
LAYER_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def inputs(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, 3, SIZE, SIZE), generator=generator), torch.tensor([66, 33, 0, 12, 99])[:batch]


def run(*arguments: Any) -> dict[str, Any]:
    """The command's JSON; a failure raises what happened."""
    small = ["--config", str(Path(arguments[0]).parent / "small.toml"), *SMALL] if arguments[0] != "verify" else []
    result = CliRunner().invoke(main, [*(str(a) for a in arguments), *small], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State dicts and exported programs of the foreign UNet, beside a scheduler configuration."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("foreign")
    (path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (path / "small.toml").write_text("[tdac]\ntrajectories = 4\n[reconstruction]\nbatch = 4\n")
    model = build()
    torch.save(model.state_dict(), path / "weights.pt")
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v.half() for k, v in model.state_dict().items()}},
        path / "trainer.pt",
    )
    save_file(model.state_dict(), path / "weights.safetensors")
    batch = torch.export.Dim("batch", min=1, max=32)
    program = torch.export.export(model, inputs(2), dynamic_shapes={"x": {0: batch}, "t": {0: batch}})
    torch.export.save(program, path / "dynamic.pt2")
    torch.export.save(
        torch.export.export(model, inputs(2)), path / "fixed.pt"
    )  # an archive under another name, with grad on
    yield path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Artifact:
    """The state dict compiled at w4a8 by the command line."""
    run(folder / "weights.pt", "--w4a8", *FACTORY, "-o", folder / "pt.qmod")
    return read(folder / "pt.qmod")


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> CompiledModel:
    return from_artifact(artifact, engine="reference")


def test_the_truth_table_is_complete(artifact: Artifact) -> None:
    rows = {row["layer"]: row for row in truth_table(artifact.lowered, "w4a8")}
    expected = {name for name, module in build().named_modules() if isinstance(module, LAYER_TYPES)}
    split = {"up_block.conv_a"}  # reads a concatenation: one row for each source
    assert expected - split <= rows.keys()
    assert {"up_block.conv_a.part0", "up_block.conv_a.part1"} <= rows.keys()
    executed = {name: row["executed"] for name, row in rows.items()}
    assert executed["stem"] == "w8a16" and executed["head"] == "w8a8"
    folded = {"time.first", "time.second", *(f"{block}.time" for block in ("down_block", "mid_a", "up_block"))}
    assert {name for name, value in executed.items() if value == "table"} == folded
    assert not [name for name, value in executed.items() if value == "float"], (
        "every layer of this model has an integer form"
    )
    assert rows["up"]["kind"] == "conv_transpose2d" and rows["up"]["executed"] in ("w4a8", "w8a8")
    assert sum(value == "w4a8" for value in executed.values()) >= 5


def test_the_requested_width_is_in_the_file(artifact: Artifact) -> None:
    rows = [row for row in truth_table(artifact.lowered, "w4a8") if row["executed"] == "w4a8"]
    # 4-bit codes: a quarter of fp16, plus one float32 scale per output channel and padding of odd rows.
    for row in rows:
        assert row["bytes"] <= row["fp16_bytes"] / 4 + 4 * max(row["shape"][:2]) + row["shape"][0] * 64


def test_integer_execution_equals_the_simulation(artifact: Artifact) -> None:
    reports = check_layers(artifact.qdq, artifact.lowered, inputs(5))
    assert len(reports) >= 15 and [r.failure for r in reports if r.failure] == []


def test_the_file_is_called_like_the_model(model: CompiledModel, artifact: Artifact) -> None:
    x, t = inputs(5)
    expected = artifact.lowered(x, t)
    assert torch.equal(model(x, t), expected)
    assert torch.equal(model(x=x, t=t), expected)
    assert torch.equal(model(x[:1], 66), artifact.lowered(x[:1], torch.tensor([66])))
    assert isinstance(model(x, t), Tensor) and model(x, t).shape == build()(x, t).shape
    with pytest.raises(InputError, match="'y' was not compiled in"):
        model(x, t, y=torch.zeros(5))


def test_onnx_runtime_loses_little_of_the_reference_engines_quality(artifact: Artifact) -> None:
    x, t = inputs(5)
    default = from_artifact(artifact)
    assert default.engine_name == "onnxruntime"
    with torch.no_grad():
        original = build()(x, t)
    assert sqnr(original, default(x, t)) > sqnr(original, artifact.lowered(x, t)) - 3


def test_eight_bits_come_close_to_the_float_model(folder: Path) -> None:
    config = QuantConfig(
        8, 8, calib_samples=16, tdac=TdacConfig(trajectories=4), reconstruction=ReconstructionConfig(iters=2, batch=4)
    )
    result = compile_model(folder / "weights.safetensors", config, factory="tests.models.foreign:build", steps=3)
    x, t = inputs(5, seed=9)
    with torch.no_grad():
        # One 8-bit grid over the range of a Gaussian is 35 to 40 dB below it, for each layer's input and weight. A dozen
        # layers in a row, added as powers, leave 24 to 29 dB (28 here); one layer with a wrong scale or bias less than 10.
        assert sqnr(build()(x, t), result.lowered(x, t)) > 22
    rows = truth_table(result.lowered, "w8a8")
    assert {row["executed"] for row in rows} == {"w8a8", "w8a16", "table"}


def test_state_dicts_give_the_same_program_whatever_the_container(folder: Path, artifact: Artifact) -> None:
    run(folder / "weights.safetensors", "--w4a8", *FACTORY, "-o", folder / "safetensors.qmod")
    other = read(folder / "safetensors.qmod")
    x, t = inputs(3)
    assert torch.equal(other.lowered(x, t), artifact.lowered(x, t))
    assert truth_table(other.lowered, "w4a8") == truth_table(artifact.lowered, "w4a8")


def test_a_trainers_checkpoint_with_prefix_and_half_precision_is_read(folder: Path) -> None:
    from edadm_compile.frontend import LoadOptions, load_source

    source = load_source(folder / "trainer.pt", LoadOptions(factory="tests.models.foreign:build", steps=3))
    assert source.module is not None
    for name, value in build().state_dict().items():
        torch.testing.assert_close(source.module.state_dict()[name], value.half().float(), rtol=0, atol=0)


def test_an_exported_program_compiles_to_the_same_layers(folder: Path, artifact: Artifact) -> None:
    summary = run(folder / "dynamic.pt2", "--w4a8", "-o", folder / "pt2.qmod")
    loaded = load(folder / "pt2.qmod")
    rows, expected = (truth_table(a.lowered, "w4a8") for a in (loaded.artifact, artifact))
    assert [row["layer"] for row in rows] == [row["layer"] for row in expected]
    assert loaded.signature.max_batch == 32 and not summary["float_layers"]
    x, t = inputs(5)
    with torch.no_grad():
        assert sqnr(build()(x, t), loaded(x, t)) > 12  # w4a8 without reconstruction, in ONNX Runtime
        assert sqnr(build()(x, t), loaded.artifact.lowered(x, t)) > 15


def test_an_archive_called_pt_with_a_fixed_batch_compiles(folder: Path) -> None:
    summary = run(folder / "fixed.pt", "--w4a8", "-o", folder / "fixed.qmod")
    assert any("batch of 2 only" in note for note in summary["notes"])
    loaded = load(folder / "fixed.qmod")
    x, t = inputs(5)
    with torch.no_grad():
        expected = build()(x, t)
    for batch in (1, 2, 5):
        assert loaded(x[:batch], t[:batch]).shape[0] == batch
        assert sqnr(expected[:batch], loaded(x[:batch], t[:batch])) > 15


def test_labels_are_an_input_of_the_compiled_model(folder: Path) -> None:
    torch.save(build_with_labels().state_dict(), folder / "labelled.pt")
    save_file({"y": torch.arange(4)}, folder / "labels.safetensors")
    run(
        folder / "labelled.pt", "--w4a8", "--factory", "tests.models.foreign:build_with_labels", "--cond", folder / "labels.safetensors",
        "-o", folder / "labelled.qmod",
    )  # fmt: skip
    loaded = load(folder / "labelled.qmod")
    assert [spec.name for spec in loaded.signature.inputs] == ["x", "t", "y"]
    x, t = inputs(4)
    y = torch.tensor([0, 1, 2, 3])
    prediction = loaded(x, t, y)
    assert torch.equal(prediction, loaded(x, t, y=y))
    with torch.no_grad():
        assert sqnr(build_with_labels()(x, t, y), prediction) > 15
    assert not torch.equal(prediction, loaded(x, t, y.flip(0)))
    rows = {row["layer"]: row for row in truth_table(loaded.artifact.lowered, "w4a8")}
    assert rows["time.first"]["executed"] == "table"  # the label joins after it
    assert rows["mid_a.time"]["role"] == "conditioning" and rows["mid_a.time"]["executed"].startswith("w")
    with pytest.raises(InputError, match="'y' is missing"):
        loaded(x, t)


def test_verify_accepts_what_was_compiled_and_refuses_another_model(folder: Path, artifact: Artifact) -> None:
    good = run(
        "verify", folder / "pt.qmod", "--reference", folder / "weights.pt", *FACTORY, "-n", "2", "--json", "--debug"
    )
    assert good["broken"] == [] and good["same_model"] and good["weights"]["failures"] == {}
    state = build().state_dict()
    state["mid_a.conv_a.weight"] = -state["mid_a.conv_a.weight"]
    torch.save(state, folder / "altered.pt")
    bad = CliRunner().invoke(
        main,
        ["verify", str(folder / "pt.qmod"), "--reference", str(folder / "altered.pt"), *FACTORY, "-n", "2", "--json"],
    )
    assert bad.exit_code == 7 and "mid_a.conv_a" in bad.output
