"""ONNX files: whole or not at all, with the weights inside or beside."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edadm_compile.errors import ExportError
from edadm_compile.export import files
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from tests.graphs import inputs_for


@pytest.fixture
def model(artifact):
    return convert(artifact.qdq, target("cpu")).model


def run(path: Path, artifact) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feeds = dict(zip(names, (v.numpy() for v in inputs_for(artifact.lowered)), strict=True))
    return torch.from_numpy(session.run(None, feeds)[0])


@pytest.mark.parametrize("how", ["asked for", "too large for one message"])
def test_weights_beside_the_graph_give_the_same_model(artifact, model, tmp_path, monkeypatch, how):
    assert files.save(model, tmp_path / "inside.onnx") == [tmp_path / "inside.onnx"]
    if how != "asked for":
        monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    written = files.save(model, tmp_path / "beside.onnx", external=True if how == "asked for" else None)
    assert written == [tmp_path / "beside.onnx.data", tmp_path / "beside.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beside.onnx", "beside.onnx.data", "inside.onnx"]
    assert (tmp_path / "beside.onnx").stat().st_size < (tmp_path / "inside.onnx").stat().st_size
    assert torch.equal(run(tmp_path / "inside.onnx", artifact), run(tmp_path / "beside.onnx", artifact))


@pytest.mark.parametrize("external", [False, True])
def test_an_invalid_graph_leaves_older_files_alone(model, tmp_path, external):
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"older")
    path.with_name("unet.onnx.data").write_bytes(b"older data")
    first = model.graph[0]
    model.graph.insert_before(first, ir.Node("", "NoSuchOperator", [model.graph.inputs[0]], name="wrong"))
    with pytest.raises(ExportError, match=r"not valid ONNX, which is a bug of the exporter: .*NoSuchOperator"):
        files.save(model, path, external=external)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "unet.onnx": b"older", "unet.onnx.data": b"older data",
    }  # fmt: skip


def test_a_disk_that_fails_leaves_older_files_alone(model, tmp_path, monkeypatch):
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"older")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(ExportError, match=f"cannot write {path}: No space left on device"):
        files.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["unet.onnx"] and path.read_bytes() == b"older"


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path, "it is a folder"),
        (tmp_path / "missing" / "unet.onnx", "folder .* does not exist"),
        (tmp_path / "file" / "unet.onnx", "folder .* does not exist"),
        (Path("/proc/unet.onnx"), "cannot write /proc/unet.onnx: "),
    ):
        with pytest.raises(ExportError, match=why):
            files.check_writable(path)
    files.check_writable(tmp_path / "unet.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_facts_about_the_origin_stay_with_the_model(artifact, tmp_path):
    from edadm_compile.driver.export import export_onnx
    from edadm_compile.runtime.artifact import write

    write(artifact, tmp_path / "a.qmod")
    export_onnx(tmp_path / "a.qmod", tmp_path / "a.onnx", check=False)
    facts = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert facts["edadm.target"] == "cpu" and facts["edadm.output_scales"] == "calibrated afterwards"
    assert '"steps": 4' in facts["edadm.sampler"] and "edadm.source" in facts
