"""Writing ONNX files: what is there before, after, and when something fails in between."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edadm_compile.driver import export
from edadm_compile.errors import ExportError
from edadm_compile.export import files
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from edadm_compile.runtime.artifact import write
from tests.export.onnx_graphs import run_onnx
from tests.graphs import inputs_for


@pytest.fixture
def model(artifact):
    return convert(artifact.qdq, target("cpu")).model


@pytest.fixture
def older(tmp_path):
    """A pair of files where the new ones are to go."""
    (tmp_path / "unet.onnx").write_bytes(b"older")
    (tmp_path / "unet.onnx.data").write_bytes(b"older data")
    return tmp_path / "unet.onnx"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


OLDER = {"unet.onnx": b"older", "unet.onnx.data": b"older data"}


def predicted(path: Path, artifact) -> torch.Tensor:
    onnx.checker.check_model(str(path), full_check=True)
    ready = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return run_onnx(ready, inputs_for(artifact.lowered))[0]


@pytest.mark.parametrize("external", [False, True])
def test_older_files_are_replaced(artifact, model, older, external):
    files.save(model, older, external=external)
    found = contents(older.parent)
    assert found.keys() == OLDER.keys() and found["unet.onnx"] != b"older"
    assert (found["unet.onnx.data"] == b"older data") == (not external)
    torch.testing.assert_close(
        predicted(older, artifact), run_onnx(ir.to_proto(model), inputs_for(artifact.lowered))[0]
    )


def test_the_data_holds_the_large_constants(model, tmp_path):
    files.save(model, tmp_path / "unet.onnx", external=True)
    stored = onnx.load(tmp_path / "unet.onnx", load_external_data=False).graph.initializer
    outside = [t for t in stored if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {e.value for t in outside for e in t.external_data if e.key == "location"} == {"unet.onnx.data"}
    largest = max(model.graph.initializers.values(), key=lambda v: v.const_value.nbytes)
    assert largest.name in {t.name for t in outside}
    sizes = {t.name: int(e.value) for t in outside for e in t.external_data if e.key == "length"}
    assert (tmp_path / "unet.onnx.data").stat().st_size >= sum(sizes.values()) >= files.weight_bytes(model) / 2


@pytest.mark.parametrize("name", ["unet ü.onnx", "unet", "a.b.c"])
def test_names_are_free(artifact, model, tmp_path, name):
    assert files.save(model, tmp_path / name, external=True) == [tmp_path / f"{name}.data", tmp_path / name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f"{name}.data"]
    assert predicted(tmp_path / name, artifact).isfinite().all()


def test_a_model_can_be_saved_again_and_in_both_ways(model, tmp_path):
    before = ir.to_proto(model).SerializeToString()
    for index, external in enumerate((True, False, True)):
        files.save(model, tmp_path / f"{index}.onnx", external=external)
        assert ir.to_proto(model).SerializeToString() == before  # and not a reference to a file that is gone
    assert (tmp_path / "0.onnx.data").read_bytes() == (tmp_path / "2.onnx.data").read_bytes()


def test_the_files_may_be_read_by_others(model, tmp_path):
    umask = os.umask(0o022)
    try:
        for path in files.save(model, tmp_path / "unet.onnx", external=True):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(umask)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), OSError(5, "Input/output error")])
def test_an_interruption_leaves_older_files_alone(model, older, monkeypatch, external, error):
    def check(path):
        assert path.is_file() and (path.with_name("unet.onnx.data").is_file() == external)
        raise error

    monkeypatch.setattr(files, "_check", check)
    with pytest.raises((KeyboardInterrupt, MemoryError, ExportError)) as caught:
        files.save(model, older, external=external)
    assert caught.value is error or str(caught.value) == f"cannot write {older}: Input/output error"
    assert contents(older.parent) == OLDER and sorted(p.name for p in older.parent.iterdir()) == sorted(OLDER)


@pytest.mark.parametrize("name", ["unet.onnx.data", "unet.onnx"])
def test_a_file_that_cannot_be_replaced_leaves_the_pair_as_it_was(model, older, monkeypatch, name):
    """Such as a file that is mounted into a container: it can be read, its folder written, but not replaced."""
    replace = Path.replace

    def busy(self, path):
        if Path(path) == older.with_name(name):
            raise OSError(16, "Device or resource busy")
        return replace(self, path)

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(ExportError, match=f"cannot write {older}: Device or resource busy"):
        files.save(model, older, external=True)
    assert contents(older.parent) == OLDER  # an older graph with newer data would compute anything


def test_a_folder_in_the_place_of_the_data_is_refused(model, tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"older")
    (tmp_path / "unet.onnx.data").mkdir()
    with pytest.raises(ExportError, match="cannot write"):
        files.save(model, tmp_path / "unet.onnx", external=True)
    assert contents(tmp_path) == {"unet.onnx": b"older"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ExportError, match=r"cannot write .*: Permission denied"):
            files.check_writable(tmp_path / "unet.onnx")
    finally:
        tmp_path.chmod(0o755)


def test_paths_without_a_folder_are_in_the_current_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.check_writable(Path("unet.onnx"))
    assert files.save(model, Path("unet.onnx")) == [Path("unet.onnx")]
    assert [p.name for p in tmp_path.iterdir()] == ["unet.onnx"]


def test_a_large_model_is_exported_and_checked_from_two_files(artifact, tmp_path, monkeypatch):
    write(artifact, tmp_path / "a.qmod")
    small = export.run(tmp_path / "a.qmod", tmp_path / "small.onnx")
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    large = export.run(tmp_path / "a.qmod", tmp_path / "large.onnx")
    names = ["large.onnx.data", "large.onnx"]
    assert large["files"] == {str(tmp_path / n): (tmp_path / n).stat().st_size for n in names}
    assert large["bytes"] == sum(large["files"].values())
    assert large["check"] == small["check"]
    assert torch.equal(predicted(tmp_path / "large.onnx", artifact), predicted(tmp_path / "small.onnx", artifact))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.qmod", "large.onnx", "large.onnx.data", "small.onnx"]
