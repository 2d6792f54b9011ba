"""The command line on the example model: one small compilation, then every verb on its file."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from torch import nn

from edadm_compile.cli import main
from edadm_compile.ir.program import get_constant, set_constant
from edadm_compile.runtime.session import load

MODEL = Path(__file__).parents[2] / "examples" / "digits" / "model.pt"
SETTINGS = "[tdac]\ntrajectories = 4\n[reconstruction]\nbatch = 8\n"


def _invoke(*args):
    """Run the command line; an exception other than an exit is a traceback the user would see."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"traceback for {args}") from result.exception
    assert "Traceback" not in result.output
    return result


def _arguments(folder, output):
    settings = folder / "settings.toml"
    settings.write_text(SETTINGS)
    return [MODEL, "--w4a8", "--iters", 3, "--calib-samples", 16, "--steps", 10, "--config", settings, "-o", output,
            "--targets", "sm_90", "--batch", 1]  # fmt: skip


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(file, summary) of one compilation."""
    folder = tmp_path_factory.mktemp("digits")
    output = folder / "digits.qmod"
    result = _invoke(*_arguments(folder, output), "--json")
    assert result.exit_code == 0, result.output
    assert [p.name for p in folder.iterdir() if p.suffix != ".toml"] == ["digits.qmod"]
    return output, json.loads(result.stdout)


@pytest.fixture(scope="session")
def inspected(compiled):
    result = _invoke("inspect", compiled[0], "--json")
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_the_summary_adds_up(compiled):
    path, summary = compiled
    assert (
        summary["output"] == str(path)
        and summary["config"] == "w4a8"
        and summary["bytes"]["file"] == path.stat().st_size
    )
    with safe_open(path, framework="pt") as stored:
        code = sum(stored.get_tensor(name).numel() for name in stored.keys() if name.startswith("device."))  # noqa: SIM118
    assert code and summary["device"]["kernels"] > 20
    assert summary["bytes"]["file"] - code < 0.5 * summary["bytes"]["fp16_parameters"]
    assert set(summary["layers"]) <= {"w4a8", "w8a8", "w8a16", "float", "table"} and summary["layers"]["w8a16"] == 1
    assert 4.0 < summary["average_weight_bits"] <= 4.7 and summary["weights"]["ratio_to_fp16"] < 0.32
    assert summary["sqnr_db"]["sqnr"] > 15 and len(summary["sqnr_db"]["per_step"]) == 10
    assert sum(summary["seconds"].values()) > 0 and summary["blocks"] > 5


def _state():
    return torch.load(MODEL, weights_only=True)["state_dict"]


def test_every_layer_of_the_model_is_in_the_table(inspected):
    rows = {row["layer"]: row for row in inspected["layers"]}
    layers = {
        name.removesuffix(".weight")
        for name, value in _state().items()
        if name.endswith(".weight") and value.dim() in (2, 4)
    }
    layers = {name for name in layers if "class_embedding" not in name}  # an embedding table is a lookup, not a product
    assert len(layers) > 30
    shown = {name.split(".part")[0] for name in rows}
    assert layers <= shown
    for row in rows.values():
        assert row["executed"] in ("w4a8", "w8a8", "w8a16", "table") or (
            row["kind"] == "attention" and row["executed"] == "float"
        ), row
        assert row["note"] or row["executed"] == "w4a8", row
    assert sum(row["executed"] == "table" for row in rows.values()) == 2
    assert sum(row["bytes"] for row in rows.values()) == inspected["totals"]["bytes"]


def test_inspection_shows_where_the_file_came_from(compiled, inspected):
    assert inspected["format"] == "edadm.qmod/1" and inspected["file_bytes"] == compiled[0].stat().st_size
    assert inspected["source"]["file"] == "model.pt" and len(inspected["source"]["sha256"]) == 64
    assert inspected["sampler"]["_class_name"] == "DDIMScheduler" and inspected["sampler"]["steps"] == 10
    assert inspected["config"]["reconstruction"]["iters"] == 3 and inspected["config"]["calib_samples"] == 16
    assert sum(inspected["allocation"]) == 16 and len(inspected["allocation"]) == 10
    assert [i["name"] for i in inspected["inputs"]] == ["sample", "timestep", "class_labels"]


def test_tables_are_printed_too(compiled):
    result = _invoke("inspect", compiled[0])
    assert result.exit_code == 0 and "conv_in" in result.output and "2 folded into tables" in result.output


def test_the_file_is_called_like_the_model(compiled):
    model = load(compiled[0])
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 7])
    for t in (901, torch.tensor([901, 901]), torch.tensor([5, 333])):  # a table row, and values beside the tables
        found = model(x, t, class_labels=labels)
        assert found.sample.shape == x.shape and bool(torch.isfinite(found.sample).all())
    assert isinstance(model(x, 901, class_labels=labels, return_dict=False), tuple)


@pytest.fixture(scope="session")
def verified(compiled):
    """(outcome of verify, the float program it captured)."""
    from edadm_compile.driver import verify

    captured = []
    with pytest.MonkeyPatch.context() as patch:
        original = verify.run_passes
        patch.setattr(verify, "run_passes", lambda *args: captured.append(original(*args)) or captured[0])
        result = _invoke("verify", compiled[0], "--reference", MODEL, "-n", 2, "--json")
    return result, captured[0]


def test_verification_passes(verified):
    result, _ = verified
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["broken"] == [] and report["same_model"] is True and report["weights"]["failures"] == {}
    assert len(report["layers"]) > 50 and all(r["accumulators_equal"] for r in report["layers"])


def test_verification_notices_another_model(compiled, verified, monkeypatch):
    from edadm_compile.driver import verify

    other = verified[1].fork()  # the captured reference with one layer changed: capturing again would take long
    name = "down_blocks.1.resnets.0.conv1.weight"
    set_constant(other.graph_module, name, get_constant(other.graph_module, name) * 1.5)
    monkeypatch.setattr(verify, "capture", lambda source: None)
    monkeypatch.setattr(verify, "run_passes", lambda *args: other)
    result = _invoke("verify", compiled[0], "--reference", MODEL, "-n", 1)
    assert result.exit_code == 7 and name.removesuffix(".weight") in result.stderr and "BROKEN" in result.stdout


@pytest.mark.parametrize("count", [5, 12])
def test_samples_are_written_as_a_png(compiled, tmp_path, count):
    result = _invoke("sample", compiled[0], "-n", count, "-o", tmp_path / "grid.png", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "output": str(tmp_path / "grid.png"),
        "count": count,
        "steps": 10,
        "scheduler": "DDIMScheduler",
        "guidance": 1.0,
        "engine": "onnxruntime",
    }
    columns, rows = min(count, 10), -(-count // 10)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (columns * 18 * 3, rows * 18 * 3) and image.mode == "RGB"
        assert len(set(image.convert("L").tobytes())) > 20


def test_samples_can_stand_beside_the_float_model(compiled, tmp_path):
    result = _invoke(
        "sample", compiled[0], "-n", 3, "--label", 4, "--reference", MODEL, "-o", tmp_path / "grid.png", "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["psnr_db"]["worst"] > 12
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * 18 * 3, 2 * 18 * 3)


def test_labels_out_of_range_are_refused(compiled, tmp_path):
    result = _invoke("sample", compiled[0], "-n", 1, "--label", 10, "-o", tmp_path / "grid.png")
    assert result.exit_code == 2 and "--label" in result.stderr and not (tmp_path / "grid.png").exists()


def test_the_same_seed_gives_the_same_bytes(compiled, tmp_path):
    output = tmp_path / "again.qmod"
    result = _invoke(*_arguments(tmp_path, output), "--quiet")
    assert result.exit_code == 0 and result.output == ""
    assert output.read_bytes() == compiled[0].read_bytes()


# Failures: one sentence, an exit code, no traceback, nothing written.


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.qmod"
    path.write_bytes(b"an older result")
    return path


def _fails(code, *args, **expected):
    result = _invoke(*args)
    assert result.exit_code == code, result.output
    assert len(result.stderr.strip().splitlines()) <= 6
    return result.stderr


@pytest.mark.parametrize("where", ["capture", "collect", "write"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, None], ids=["ctrl-c", "failure"])
def test_an_older_file_survives(old, monkeypatch, where, error):
    from edadm_compile import pipeline
    from edadm_compile.driver import compile as driver
    from edadm_compile.errors import CaptureError

    def stop(*args, **kwargs):
        raise (error() if error is not None else CaptureError("stopped here"))

    if where == "write":  # as if everything before had gone well
        monkeypatch.setattr(driver, "compile_source", lambda *args, **kwargs: SimpleNamespace(lowered=None, seconds={}))
        monkeypatch.setattr(driver, "to_artifact", lambda result, device: None)
    monkeypatch.setattr(driver if where == "write" else pipeline, where, stop)
    if where == "collect":
        monkeypatch.setattr(pipeline, "run_passes", lambda program, *rest: program)
        monkeypatch.setattr(pipeline, "capture", lambda source: None)
        monkeypatch.setattr(pipeline, "check_parameters", lambda program: None)
        monkeypatch.setattr(pipeline, "_evaluations", lambda program, config: None)
        monkeypatch.setattr("edadm_compile.driver.workdir.program_of", lambda program: {})
    message = _fails(130 if error is not None else 3, MODEL, "--w4a8", "-o", old, "--quiet", "--targets", "none")
    assert ("interrupted: nothing was written" if error is not None else "error: stopped here") in message
    assert old.read_bytes() == b"an older result" and [p.name for p in old.parent.iterdir()] == [old.name]


def test_ctrl_c_while_the_bytes_are_written(old, compiled, monkeypatch):
    import os

    from edadm_compile.driver import compile as driver
    from edadm_compile.runtime.artifact import read

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "compile_source", lambda *args, **kwargs: SimpleNamespace(lowered=None, seconds={}))
    monkeypatch.setattr(driver, "to_artifact", lambda result, device: read(compiled[0]))
    monkeypatch.setattr(os, "fsync", interrupt)
    assert "interrupted" in _fails(130, MODEL, "--w4a8", "-o", old, "--quiet", "--targets", "none")
    assert old.read_bytes() == b"an older result" and [p.name for p in old.parent.iterdir()] == [old.name]


def test_a_missing_model(tmp_path):
    assert "does not exist" in _fails(2, tmp_path / "nothing.pt", "--w4a8", "-o", tmp_path / "a.qmod")


class _Evil:
    def __reduce__(self):
        return (exec, ("raise SystemError('executed')",))


def test_pickles_are_not_opened(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pt")
    message = _fails(2, tmp_path / "module.pt", "-o", tmp_path / "a.qmod")
    assert "pickled Python object" in message and "--trust-pickle" in message and "torch.export.save" in message
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(_Evil()))
    assert "error:" in _fails(2, tmp_path / "evil.pt", "-o", tmp_path / "a.qmod")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "3x32x32"], "--shape: got '3x32x32'"),
        (["--w4a8", "--weights-bits", "8"], "--w4a8 and --weights-bits 8 contradict"),
        (["--w5a8"], "unknown option --w5a8; did you mean"),
        (["--weights-bits", "9"], "weight_bits: got 9"),
        (["--acts-bits", "1"], "act_bits: got 1"),
        (["--method", "gptq"], "gptq"),
        (["--iters", "-1"], "reconstruction.iters: got -1"),
        (["--calib-samples", "0"], "calib_samples: got 0"),
        (["--seed", "-3"], "seed: got -3"),
        (["--steps", "0"], "steps: got 0"),
        (["--steps", "5000"], "steps: got 5000, allowed 1 to 1000"),
        (["--steps", "many"], "many"),
        (["--device", "cuda"], "--device"),
        (["--config", "missing.toml"], "cannot read settings file"),
        (["--scheduler", "missing.json"], "cannot read scheduler file"),
        (["--cond", "missing.safetensors"], "--cond"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_options_are_explained(tmp_path, args, message):
    assert message in _fails(2, MODEL, *args, "-o", tmp_path / "a.qmod")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(tmp_path):
    assert "does not exist" in _fails(6, MODEL, "-o", tmp_path / "nowhere" / "a.qmod")
    assert "it is a folder" in _fails(6, MODEL, "-o", tmp_path)


@pytest.mark.parametrize("verb", ["inspect", "sample", "verify"])
def test_damaged_files_are_explained_by_every_verb(compiled, tmp_path, verb):
    damaged = tmp_path / "damaged.qmod"
    data = bytearray(compiled[0].read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(bytes(data))
    extra = {"inspect": [], "sample": ["-o", tmp_path / "grid.png"], "verify": ["--reference", MODEL]}[verb]
    assert "damaged" in _fails(6, verb, damaged, *extra)
    assert "cannot read" in _fails(6, verb, tmp_path / "nothing.qmod", *extra)
    assert not (tmp_path / "grid.png").exists()


def test_a_reference_with_other_inputs_is_refused(compiled, tmp_path):
    checkpoint = torch.load(MODEL, weights_only=True)
    checkpoint["model"]["config"]["sample_size"] = 32
    torch.save(checkpoint, tmp_path / "larger.pt")
    message = _fails(2, "verify", compiled[0], "--reference", tmp_path / "larger.pt")
    assert "--reference takes inputs" in message


def test_help_and_version():
    for args in (["--help"], ["compile", "--help"], ["inspect", "-h"], ["sample", "--help"], ["verify", "--help"]):
        result = _invoke(*args)
        assert result.exit_code == 0 and "Usage" in result.output
    assert "0.1.0" in _invoke("--version").output
    for preset in ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4"):
        assert f"--{preset}" in _invoke("compile", "--help").output


def test_the_onnx_file_is_small_and_runs_in_integers(compiled, tmp_path):
    sizes = {}
    for option, limit in (("--no-check", 0.27), ("--int4", 0.16)):
        output = tmp_path / f"digits{option}.onnx"
        result = _invoke("export", compiled[0], "-o", output, option, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        assert 0.1 < report["weights"]["ratio"] <= limit
        sizes[option] = output.stat().st_size
    assert sizes["--int4"] < 0.75 * sizes["--no-check"]
    counts = report["check"]["counts"]
    assert report["weights"]["layers"]["int4"] > 30
    assert all(counts[kind]["float"] == 0 and counts[kind]["integer"] > 20 for kind in ("conv2d", "linear"))
    reasons = {r["why"] for r in report["check"]["layers"] if not r["integer"]}
    assert len(reasons) == 1 and "--attention int8" in reasons.pop()


def test_both_engines_draw_the_same_digits(compiled, tmp_path):
    for engine in ("onnxruntime", "reference"):
        result = _invoke("sample", compiled[0], "-n", 10, "-o", tmp_path / f"{engine}.png", "--engine", engine)
        assert result.exit_code == 0 and f"on the {engine} engine" in " ".join(result.stdout.split())
    pictures = []
    for engine in ("onnxruntime", "reference"):
        with Image.open(tmp_path / f"{engine}.png") as image:
            pictures.append(torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).double())
    error = (pictures[0] - pictures[1]).square().mean()
    assert 10 * torch.log10(255**2 / error) > 25


@pytest.fixture
def example(monkeypatch):
    """The scripts of the example."""
    import importlib

    monkeypatch.syspath_prepend(str(MODEL.parent))
    return importlib.import_module("judge_files")


def test_the_quality_of_the_file_is_measured_with_the_examples_classifier(compiled, example, tmp_path):
    example.write_data(tmp_path / "real.npz")
    limits = ["--fail-below", "sqnr=15,psnr=15,ssim=0.5", "--fail-above", "frechet=5,frechet_data=30"]
    args = ["evaluate", compiled[0], "--reference", MODEL, "-n", 20, "--data", tmp_path / "real.npz", "--json"]
    result = _invoke(*args, *limits)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["same_model"] is True and len(report["noise"]["per_step"]) == 10 and report["data"]["images"] == 1797
    assert [row["between"] for row in report["distances"]] == [
        ["quantized", "float"], ["quantized", "data"], ["float", "data"],
    ]  # fmt: skip
    assert all(row["features"] == "features.pt2" and row["dimension"] == 48 for row in report["distances"])
    assert report["distances"][0]["frechet"] < 0.5 * report["distances"][1]["frechet"]
    result = _invoke(*args, "--fail-below", "psnr=60")
    assert result.exit_code == 7 and "psnr (PSNR of the images, mean) is" in result.stderr


def test_the_examples_extractor_is_its_classifier(example, tmp_path):
    from edadm_compile.frontend.feature_file import load_extractor

    images = example.load_real_digits()[0][:70]
    expected = example.load_classifier().features(images).double()
    example.write_features(tmp_path / "again.pt2")
    for path in (MODEL.with_name("features.pt2"), tmp_path / "again.pt2"):
        torch.testing.assert_close(load_extractor(path, (1, 16, 16))(images), expected, rtol=1e-5, atol=1e-5)
