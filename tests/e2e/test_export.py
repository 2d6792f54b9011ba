"""`edadm-compile export` on the example model: one small compilation for ONNX Runtime, then the command and its file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.runtime.session import load

MODEL = Path(__file__).parents[2] / "examples" / "digits" / "model.pt"
SETTINGS = "[tdac]\ntrajectories = 2\n[reconstruction]\nbatch = 4\n"


def invoke(*arguments, code=0):
    """Run the command line; an exception other than an exit is a traceback that a user would see."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"traceback for {arguments}") from result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    (folder / "settings.toml").write_text(SETTINGS)
    invoke(
        "compile", MODEL, "--w4a8", "--deploy", "onnxruntime", "--iters", 0, "--calib-samples", 8, "--steps", 5,
        "--config", folder / "settings.toml", "-o", folder / "digits.qmod", "--quiet",
    )  # fmt: skip
    return folder / "digits.qmod"


@pytest.fixture(scope="module")
def exported(compiled):
    """(file, report) with 4-bit constants, and the quality against the float model."""
    output = compiled.with_name("digits.onnx")
    result = invoke("export", compiled, "--reference", MODEL, "--int4", "--json")  # beside the file, by its name
    assert output.is_file()
    return output, json.loads(result.stdout)


def test_the_report_says_what_runs_and_how_well(exported):
    output, report = exported
    assert report["output"] == str(output) and report["files"] == {str(output): output.stat().st_size}
    assert report["target"] == "cpu" and report["int4"] and report["output_scales"] == "in the reconstruction"
    assert report["weights"]["layers"]["int4"] > 30 and 1 / 8 < report["weights"]["ratio"] <= 0.16
    check = report["check"]
    assert check["broken"] == []
    assert check["counts"]["conv2d"] == {"integer": 41, "float": 0}
    assert check["counts"]["linear"] == {"integer": 23, "float": 0}
    assert check["operators"]["QLinearConv"] >= 30 and "Conv" not in check["operators"]
    ends = check["end_to_end"]
    assert ends["sqnr_to_reference_db"] > 30  # 35.0 was measured: codes on a border flip, and their images drift apart
    assert abs(ends["sqnr_to_float_db"] - ends["reference_engine_sqnr_to_float_db"]) < 0.5
    assert ends["sqnr_to_float_db"] > 20


def test_the_file_runs_in_onnx_runtime_as_it_is(compiled, exported):
    session = onnxruntime.InferenceSession(str(exported[0]))
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("sample", "tensor(float)", ["batch", 1, 16, 16]), ("timestep", "tensor(int64)", ["steps"]),
        ("class_labels", "tensor(int64)", ["batch"]),
    ]  # fmt: skip
    model = load(compiled)
    assert model.engine_name == "onnxruntime"
    x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, 7, 0])
    for t in (torch.tensor([800, 0, 400]), torch.tensor([801, 3, 400]), torch.tensor([600])):
        feeds = {"sample": x.numpy(), "timestep": t.numpy(), "class_labels": labels.numpy()}
        (found,) = session.run(["out_sample"], feeds)
        wanted = model.predict(x, t.expand(3), labels)
        noise = float((torch.from_numpy(found) - wanted).square().sum() / wanted.square().sum())
        # Options of the session differ, so float operators may round otherwise; equal was measured.
        assert found.dtype == np.float32 and found.shape == (3, 1, 16, 16) and noise < 1e-4


def test_the_file_is_standard_onnx_with_4_bit_constants(exported):
    model = onnx.load(exported[0])
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    kinds = [t.data_type for t in model.graph.initializer]
    phases = {n.name for n in model.graph.node if ".phase" in n.name and n.op_type == "Cast"}  # four for a layer
    assert kinds.count(onnx.TensorProto.INT4) == exported[1]["weights"]["layers"]["int4"] + len(phases) * 3 // 4
    facts = {p.key: p.value for p in model.metadata_props}
    assert len(facts["edadm.source"]) == 64 and json.loads(facts["edadm.sampler"])["steps"] == 5


def test_the_printed_report_is_the_same_in_words(compiled, exported, tmp_path):
    text = " ".join(invoke("export", compiled, "-o", tmp_path / "a.onnx").stdout.split())
    assert re.search(r"a\.onnx: \d\.\d+ MB for ONNX Runtime on x86", text)
    assert "run in integers by ONNX Runtime: 0 of 3 attention, 41 of 41 conv2d, 23 of 23 linear" in text
    left = [row for row in exported[1]["check"]["layers"] if not row["integer"]]
    assert (
        len(left) == 3 and all("--attention int8 quantizes it" in row["why"] for row in left) and " in float " in text
    )
    assert "between layers: input codes of" in text and "0.500 steps from the values" in text
    db = exported[1]["check"]["end_to_end"]["sqnr_to_reference_db"]
    assert f"end to end against the reference engine: {db:.1f} dB SQNR" in text
    assert "scales of convolution outputs: in the reconstruction" in text
    assert "against the float model" not in text and "INT4" not in text and "note:" not in text


def test_a_tensorrt_file_says_what_it_costs(compiled, tmp_path):
    result = invoke("export", compiled, "-o", tmp_path / "a.onnx", "--onnx-target", "tensorrt")
    text = " ".join(result.stdout.split())
    assert "for TensorRT: symmetric int8, explicit quantization" in text
    assert "64 layers are written in integers for tensorrt; on this machine they run in float" in text
    assert "against the program with symmetric codes, fed the same codes: float outputs differ by at most" in text
    assert "note: activations were made symmetric, which costs accuracy" in text
    zeros = {n.input[2] for n in onnx.load(tmp_path / "a.onnx").graph.node if n.op_type == "QuantizeLinear"}
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert all(stored[z].dtype == np.int8 and not stored[z].any() for z in zeros)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--int4", "--onnx-target", "tensorrt"], "--int4: TensorRT takes INT4 constants in blocks"),
        (["-o", "nowhere/a.onnx"], "cannot write nowhere/a.onnx: folder nowhere does not exist"),
        (["-o", "."], "it is a folder"),
    ],
)
def test_bad_requests_are_one_sentence(compiled, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = invoke("export", compiled, *options, code=9)
    assert result.stdout == "" and list(tmp_path.iterdir()) == []
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert message in line and line == result.stderr.splitlines()[-1]


def test_other_mistakes_have_their_own_codes(compiled, tmp_path):
    assert "cannot read" in invoke("export", tmp_path / "none.qmod", "-o", tmp_path / "a.onnx", code=6).stderr
    invoke("export", compiled, "--onnx-target", "gpu", code=2)
    missing = invoke("export", compiled, "-o", tmp_path / "a.onnx", "--reference", tmp_path / "none.pt", code=2)
    assert missing.stderr.splitlines()[-1].startswith("error:") and list(tmp_path.iterdir()) == []


def test_a_pipeline_layout_has_a_scalar_timestep(compiled, tmp_path):
    report = json.loads(
        invoke("export", compiled, "-o", tmp_path / "pipe", "--layout", "diffusers", "--no-check", "--json").stdout
    )
    assert sorted(report["files"]) == [str(tmp_path / "pipe" / "unet" / n) for n in ("config.json", "model.onnx")]
    session = onnxruntime.InferenceSession(str(tmp_path / "pipe" / "unet" / "model.onnx"))
    assert [i.shape for i in session.get_inputs()] == [["batch", 1, 16, 16], [], ["batch"]]
    assert json.loads((tmp_path / "pipe" / "unet" / "config.json").read_text())["_class_name"].endswith("UNet2DModel")
