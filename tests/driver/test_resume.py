"""Compilations that are stopped and run again: the bytes of the file are those of one run."""

import dataclasses

import pytest
import torch

from edadm_compile.config import ReconstructionConfig
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.driver.session import WorkOptions, parse_memory, session
from edadm_compile.driver.workdir import Workdir
from edadm_compile.errors import InputError, ResourceError, ResumeError, Stopped
from edadm_compile.passes.reconstruct import UnitTrainer
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import to_bytes
from tests.graphs import TinyUNet, small_config, source_of

CONFIG = small_config(attention="int8")


def _bytes(result):
    return to_bytes(to_artifact(result))


def _stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Let `Workdir.save` raise once it has kept `count` more stages."""
    real, seen = Workdir.save, []

    def save(self, name, saved):
        real(self, name, saved)
        seen.append(name)
        if len(seen) == count:
            raise error

    monkeypatch.setattr(Workdir, "save", save)
    return seen


def test_stopped_and_resumed_many_times(labelled_source, data, tmp_path, monkeypatch, caplog):
    """Stops behind the samples and twice between blocks; caches in memory, in files and in both."""
    folder, kept = tmp_path / "w", list[str]()
    for count, memory in ((1, None), (6, 0), (5, "10kB")):
        with monkeypatch.context() as patch:
            saved = _stop_after(patch, count)
            with pytest.raises(Stopped, match=f"interrupted: no output was written; kept in {folder}") as stop:
                compile_model(labelled_source, CONFIG, workdir=folder, memory=memory)
            assert stop.value.exit_code == 130
        kept += saved
    assert len(kept) == len(set(kept)) == 12  # nothing was made twice
    result = compile_model(labelled_source, CONFIG, workdir=folder, memory=0)
    assert _bytes(result) == data
    assert {"calibration", "assign_widths", "calibrate", "reconstruct"} <= set(result.restored)
    assert "resuming from" in caplog.text and "is damaged" not in caplog.text
    blocks = len(list((folder / "stages").glob("reconstruct.joint.*")))
    assert blocks == len(result.stats["reconstruct"]["units"]) > 4


def test_a_finished_folder_gives_the_file_again_without_any_training(labelled_source, data, tmp_path, monkeypatch):
    assert _bytes(compile_model(labelled_source, CONFIG, workdir=tmp_path, memory=1000)) == data
    monkeypatch.setattr(UnitTrainer, "run", None)
    result = compile_model(labelled_source, CONFIG, workdir=tmp_path)
    assert _bytes(result) == data and set(result.restored) == {
        "calibration", "assign_widths", "float_outputs", "calibrate", "reconstruct", "mean_correction", "quality",
    }  # fmt: skip
    changed = dataclasses.replace(CONFIG, seed=1)
    with pytest.raises(ResumeError, match=r"config.seed was 0, is 1"):
        compile_model(labelled_source, changed, workdir=tmp_path)
    with pytest.raises(ResumeError, match=r"program.weights was \w{12}..., is \w{12}"):
        other = source_of(TinyUNet(classes=5, seed=1), num_classes={"label": 5})
        compile_model(other, CONFIG, workdir=tmp_path)


def test_damaged_checkpoints_are_made_again(labelled_source, data, tmp_path, caplog):
    compile_model(labelled_source, CONFIG, workdir=tmp_path)
    for name in ("calibration", "reconstruct.joint.002", "mean_correction"):
        path = tmp_path / "stages" / f"{name}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert _bytes(compile_model(labelled_source, CONFIG, workdir=tmp_path)) == data
    assert [r.message.split(" is damaged")[0].rpartition("/")[2] for r in caplog.records if "is damaged" in r.message] == [
        "calibration.safetensors", "reconstruct.joint.002.safetensors", "mean_correction.safetensors",
    ]  # fmt: skip


def test_out_of_memory_in_a_block_names_it_and_keeps_the_others(labelled_source, data, tmp_path, monkeypatch, caplog):
    real, calls = UnitTrainer.run, []

    def run(self, ctx, label):
        calls.append(label)
        if len(calls) == 3:
            torch.empty(1 << 60)  # what the allocator says when it is asked for an exabyte
        return real(self, ctx, label)

    with monkeypatch.context() as patch:
        patch.setattr(UnitTrainer, "run", run)
        with pytest.raises(ResourceError) as caught:
            compile_model(labelled_source, CONFIG, workdir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"out of memory while reconstructing {calls[2]} (") and calls[2].startswith("block 3/")
    assert "--memory" in message and "reconstruction.batch" in message
    assert f"kept in {tmp_path} for a run of the same command: " in caplog.text and "2 blocks" in caplog.text
    assert _bytes(compile_model(labelled_source, CONFIG, workdir=tmp_path)) == data


@pytest.mark.parametrize(
    "settings",
    [{"method": "q-diffusion"}, {"deploy": "onnxruntime", "budget_bits": 5.0}],
    ids=lambda s: next(iter(s.values())),
)
def test_every_kind_of_stage_is_restored_exactly(settings, tmp_path, monkeypatch):
    config = small_config(reconstruction=ReconstructionConfig(iters=3, batch=4), **settings)
    source = source_of(TinyUNet())
    once = _bytes(compile_source(source, config))
    with monkeypatch.context() as patch:
        # q-diffusion: in the second of its phases, so that one is finished and one is not
        _stop_after(patch, 12 if "method" in settings else 5)
        with pytest.raises(Stopped):
            compile_model(source, config, workdir=tmp_path)
    assert _bytes(compile_model(source, config, workdir=tmp_path)) == once


def test_the_number_of_threads_is_a_setting_and_recorded():
    """Sums of gradients depend on it; with a fixed number they do not depend on what the machine has."""
    config, source = small_config(reconstruction=ReconstructionConfig(iters=2, batch=8)), source_of(TinyUNet(width=16))
    before, files = torch.get_num_threads(), []
    for outside, inside in ((1, None), (2, 1)):
        torch.set_num_threads(outside)
        try:
            files.append(to_artifact(compile_model(source, config, threads=inside)))
            assert torch.get_num_threads() == outside
        finally:
            torch.set_num_threads(before)
    assert [f.manifest["computed_with"]["threads"] for f in files] == ["1", "1"]
    assert to_bytes(files[0]) == to_bytes(files[1])


def test_sizes_of_memory():
    assert [parse_memory(t) for t in ("4GB", "1.5 gb", "512MiB", "10kB", "7", 7, "0")] == [
        4_000_000_000, 1_500_000_000, 512 << 20, 10_000, 7, 7, 0,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "4 parsecs", "1e9", True, "nan"):
        with pytest.raises(InputError, match="expected a size such as 4GB"):
            parse_memory(text)


def test_settings_of_the_work(tmp_path):
    with pytest.raises(InputError, match="needs a working folder"), session(WorkOptions(memory=5), {}):
        pass
    with pytest.raises(InputError, match="threads: got 0"), session(WorkOptions(threads=0), {}):
        pass
    before = torch.get_num_threads()
    with session(WorkOptions(threads=before + 1), {}):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
