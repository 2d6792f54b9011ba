"""The export verb: what it reports, what it refuses, and that a broken graph is not written."""

from __future__ import annotations

import dataclasses
import json

import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from diffusers import UNet2DModel
from safetensors.torch import save_file

import edadm_compile
from edadm_compile.cli import main
from edadm_compile.config import QuantConfig
from edadm_compile.driver import export
from edadm_compile.driver.compile import compile_model
from edadm_compile.errors import ContractError, ExportError
from edadm_compile.export.operators import codes, layers
from edadm_compile.ir.program import SamplerSpec, layer_of
from edadm_compile.runtime.artifact import write
from tests.exported_files import unharmed
from tests.graphs import DDIM
from tests.lowering.plans import QUICK


def test_the_report_is_complete(path, old):
    report = edadm_compile.export_onnx(str(path), str(old))
    assert report["files"] == {str(old): old.stat().st_size} and report["bytes"] == old.stat().st_size
    assert report["output_scales"] == "calibrated afterwards" and report["target"] == "cpu"
    check = report["check"]
    assert check["broken"] == [] and set(check["counts"]) == {"conv2d", "conv_transpose2d", "linear", "matmul"}
    assert all(c["float"] == 0 and c["integer"] > 0 for c in check["counts"].values())
    assert 0 <= check["end_to_end"]["largest_error"] < check["end_to_end"]["largest_value"]
    codes_of = [r for r in check["layers"] if r["output"] == "codes"]
    assert codes_of and all(r["error"] <= 1 and 0 <= r["differing_share"] < 0.05 for r in codes_of)
    json.dumps(report, allow_nan=False)


def test_without_a_check_nothing_is_run(path, old, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    report = export.run(path, old, check=False)
    assert report["check"] is None and old.stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onnx_target": "gpu"}, "--onnx-target: got 'gpu', allowed cpu, arm, tensorrt"),
        ({"layout": "tree"}, "--layout: got 'tree', allowed file, diffusers"),
        ({"int4": True, "onnx_target": "tensorrt"}, "--int4: TensorRT takes INT4 constants in blocks"),
    ],
)
def test_requests_without_a_form_are_refused(path, old, options, message):
    with pytest.raises(ExportError, match=message):
        export.run(path, old, **options)
    assert unharmed(old)


def test_a_file_without_output_scales_is_refused(artifact, tmp_path, old):
    programs = [artifact.qdq.fork(), artifact.lowered.fork()]
    for node in (n for program in programs for n in program.graph_module.graph.nodes):
        if (info := layer_of(node)) is not None:
            node.meta["layer"] = dataclasses.replace(info, out_scale=None, out_zero_point=None)
    path = tmp_path / "old.qmod"
    write(dataclasses.replace(artifact, qdq=programs[0], lowered=programs[1]), path)
    with pytest.raises(ExportError, match=r"layer \S+ has no output scale, .* compile the model again"):
        export.run(path, old)
    assert unharmed(old)


def test_an_operator_without_onnx_form_is_named(path, old, monkeypatch):
    from edadm_compile.export import convert

    without = {k: v for k, v in convert.emitters().items() if k != "aten.group_norm.default"}
    monkeypatch.setattr(convert, "emitters", lambda: without)
    with pytest.raises(ExportError, match=r"aten\.group_norm\.default"):
        export.run(path, old)
    assert unharmed(old)


def test_missing_packages_are_named(path, old, monkeypatch):
    monkeypatch.setattr(export, "missing_packages", lambda **_: "onnx_ir")
    with pytest.raises(
        ExportError, match=r"export needs onnx_ir, not installed; run: pip install 'edadm-compile\[onnx\]'$"
    ):
        export.run(path, old)
    assert unharmed(old)


@pytest.mark.parametrize("sabotage", ["scale", "zero point", "bias"])
def test_a_graph_that_computes_something_else_is_not_written(path, old, monkeypatch, sabotage):
    if sabotage == "scale":
        right = layers.weight
        wrong = lambda s, name, c, scale, bits, axis: right(s, name, c, scale * 1.03, bits, axis)  # noqa: E731
        monkeypatch.setattr(layers, "weight", wrong)
    elif sabotage == "bias":
        right = layers._bias
        monkeypatch.setattr(layers, "_bias", lambda s, name, bias, scale: right(s, name, bias + 0.05, scale))
    else:
        right = codes.zero_code
        monkeypatch.setattr(
            layers, "zero_code", lambda s, node: s.const(right(s, node).const_value.numpy().item() + 9, torch.uint8)
        )
    with pytest.raises(ContractError, match=r"something else than the reference engine in .* place"):
        export.run(path, old)
    assert unharmed(old)


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory):
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline") / "unet.qmod"
    compile_model(module, QuantConfig(8, 8, **QUICK), sampler=SamplerSpec(DDIM, 3), output=path)
    return path


def test_a_pipeline_folder_gets_graph_and_configuration(pipeline_file, tmp_path):
    folder = tmp_path / "pipeline"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    report = export.run(pipeline_file, folder, layout="diffusers")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "model_index.json", "unet/config.json", "unet/model.onnx",
    ]  # fmt: skip
    assert set(report["files"]) == {str(folder / "unet" / n) for n in ("model.onnx", "config.json")}
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel" and config["sample_size"] == 8 and "time_cond_proj_dim" in config
    session = onnxruntime.InferenceSession(str(folder / "unet" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, len(i.shape)) for i in session.get_inputs()] == [("sample", 4), ("timestep", 0)]
    x = torch.randn(2, 3, 8, 8)
    (found,) = session.run(["out_sample"], {"sample": x.numpy(), "timestep": torch.tensor(33).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), edadm_compile.load(pipeline_file)(x, 33).sample)


def test_pipeline_folders_that_cannot_be_made_are_refused(pipeline_file, path, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ExportError, match="needs a folder, this is a file"):
        export.run(pipeline_file, tmp_path / "taken", layout="diffusers")
    with pytest.raises(ExportError, match="not compiled from a diffusers model"):
        export.run(path, tmp_path / "new", layout="diffusers")
    assert not (tmp_path / "new").exists()


def test_the_command_prints_what_runs(path, tmp_path):
    run = CliRunner().invoke(main, ["export", str(path), "-o", str(tmp_path / "x.onnx"), "--quiet"])
    assert run.exit_code == 0 and run.stdout == ""
    run = CliRunner().invoke(main, ["export", str(path), "-o", str(tmp_path / "x.onnx"), "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["output"] == str(tmp_path / "x.onnx")
    run = CliRunner().invoke(main, ["export", str(path), "-o", str(tmp_path / "x.onnx")])
    text = " ".join(run.stdout.split())
    assert "run in integers by ONNX Runtime:" in text and "differ by at most" in text and "as INT4" not in text
    run = CliRunner().invoke(main, ["export", str(path), "-o", str(tmp_path / "none" / "x.onnx")])
    assert run.exit_code == 9 and run.stderr.splitlines()[-1].startswith("error: cannot write")


def test_conditions_of_the_check_come_from_the_user_or_are_drawn(tmp_path):
    torch.manual_seed(0)
    path, values = tmp_path / "c.qmod", torch.randn(6, 4)
    compile_model(
        Conditioned().eval(), QuantConfig(8, 8, **QUICK), sampler=SamplerSpec(DDIM, 3), output=path, shape=(3, 8, 8),
        conditions={"context": values},
    )  # fmt: skip
    assert export.run(path, tmp_path / "c.onnx")["check"]["broken"] == []
    save_file({"context": values}, tmp_path / "values.safetensors")
    assert export.run(path, tmp_path / "c.onnx", conditions=tmp_path / "values.safetensors")["check"]["broken"] == []
    signature = edadm_compile.load(path).signature
    given = export._conditions(signature, None, {"conditions": tmp_path / "values.safetensors"})
    drawn = export._conditions(signature, None, {})
    assert torch.equal(given["context"], values) and drawn["context"].shape == (2, 4)


class Conditioned(torch.nn.Module):
    """A network with a float condition."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
        self.project = torch.nn.Linear(4, 8)

    def forward(self, x, t, context):
        return self.head(torch.tanh(self.stem(x) + self.project(context)[:, :, None, None]))
