import json
import os

import pytest
import torch

from edadm_compile.driver.checkpoint_file import DamagedCheckpoint, decode, encode
from edadm_compile.driver.workdir import Workdir
from edadm_compile.errors import ResourceError, ResumeError
from edadm_compile.passes.checkpoint import Saved
from tests.graphs import GraphBuilder

INPUTS = {"model": {"sha256": "a" * 64}, "config": {"seed": 0, "reconstruction": {"iters": 20}}}


def _program(width=4):
    build = GraphBuilder()
    return build.program(build.conv("head", build.conv("stem", build.x, 4, width), width, 4))


class _Listener(list):
    """Keeps what is said."""

    def __call__(self, sentence):
        self.append(sentence)


def _opened(folder, inputs=INPUTS, program=None, said=None, restart=False):
    workdir = Workdir(folder, _Listener() if said is None else said)
    try:
        workdir.claim(inputs, restart=restart)
        workdir.begin(program or _program())
    except Exception:
        workdir.close()
        raise
    return workdir


def _tensors():
    image = torch.randn(2, 3, 4, 5)
    return {
        "plain": image,
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "transposed": image.transpose(1, 3),
        "one channel": torch.empty_strided((2, 1, 3), (3, 7, 1)).fill_(2.0),
        "expanded": torch.ones(1, 4).expand(3, 4),
        "shared": image[0],
        "scalar": torch.tensor(1.5),
        "codes": torch.tensor([[-8, 7]], dtype=torch.int8),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.empty(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


VALUES = {"a": 0.1 + 0.2, "b": [1, None, "é"], "c": float("inf"), "d": {"e": 1e-300}}


def test_tensors_come_back_bit_for_bit_with_their_strides(tmp_path):
    (tmp_path / "a").write_bytes(encode(Saved(_tensors(), VALUES, 2.5), "run"))
    found = decode(tmp_path / "a", "run")
    assert found.values == VALUES and found.seconds == 2.5 and set(found.tensors) == set(_tensors())
    torch.manual_seed(0)
    tensors = _tensors()
    (tmp_path / "a").write_bytes(encode(Saved(tensors), "run"))
    for name, value in decode(tmp_path / "a", "run").tensors.items():
        expected = tensors[name]
        assert value.dtype == expected.dtype and value.shape == expected.shape
        assert value.contiguous().view(-1).view(torch.uint8).equal(expected.contiguous().view(-1).view(torch.uint8))
        assert value.stride() == expected.stride() or name == "expanded"


def test_any_changed_byte_is_noticed(tmp_path):
    good = encode(Saved({"x": torch.arange(5.0)}, {"a": 1}, 1.0), "run")
    path = tmp_path / "a"
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(DamagedCheckpoint):
            decode(path, "run")
    for size in (0, 7, 8, 100, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(DamagedCheckpoint):
            decode(path, "run")


def test_a_second_process_finds_what_the_first_kept(tmp_path):
    first = _opened(tmp_path / "w")
    assert first.load("calibration") is None
    first.save("calibration", Saved({"x": torch.ones(2)}, {"n": 2}, 3.0))
    first.save("reconstruct.joint.000", Saved(seconds=4.0))
    first.save("reconstruct.joint.001", Saved(seconds=5.0))
    assert first.kept() == "calibration samples and 2 blocks"
    first.close()
    said = _Listener()
    second = _opened(tmp_path / "w", said=said)
    assert said == [f"resuming from {tmp_path / 'w'}: calibration samples and 2 blocks from an earlier run"]
    found = second.load("calibration")
    assert torch.equal(found.tensors["x"], torch.ones(2)) and found.values == {"n": 2}
    second.load("reconstruct.joint.001")
    assert second.restored == {"calibration": 3.0, "reconstruct.joint.001": 5.0}
    second.remove()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_told_and_dropped(tmp_path):
    said = _Listener()
    workdir = _opened(tmp_path / "w", said=said)
    workdir.save("calibrate", Saved(values={"a": 1}))
    path = tmp_path / "w" / "stages" / "calibrate.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert workdir.load("calibrate") is None and workdir.restored == {}
    assert len(said) == 1 and f"checkpoint {path} is damaged and is made again" in said[0]
    assert workdir.load("calibrate") is None and len(said) == 1 and workdir.kept() == ""
    workdir.save("calibrate", Saved(values={"a": 2}))
    assert workdir.load("calibrate").values == {"a": 2}
    workdir.close()


def test_a_checkpoint_of_another_compilation_is_not_taken(tmp_path):
    first, said = _opened(tmp_path / "a"), _Listener()
    first.save("quality", Saved(values={"a": 1}))
    other = _opened(tmp_path / "b", {**INPUTS, "config": {"seed": 1}}, said=said)
    name = "stages/quality.safetensors"
    (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert other.load("quality") is None and "another compilation" in said[0]
    first.close()
    other.close()


@pytest.mark.parametrize(
    "inputs, phrase",
    [
        ({**INPUTS, "config": {"seed": 1, "reconstruction": {"iters": 20}}}, "config.seed was 0, is 1"),
        (
            {**INPUTS, "config": {"seed": 0, "reconstruction": {"iters": 30}}},
            "config.reconstruction.iters was 20, is 30",
        ),
        (
            {**INPUTS, "model": {"sha256": "b" * 64}},
            f"model.sha256 was {'a' * 12}..., is {'b' * 12}...",
        ),
        ({**INPUTS, "conditions": {"label": "c" * 64}}, f"conditions.label was absent, is {'c' * 12}..."),
    ],
    ids=["seed", "iters", "model", "conditions"],
)
def test_a_changed_input_is_refused_by_name_and_nothing_is_lost(tmp_path, inputs, phrase):
    first = _opened(tmp_path / "w")
    first.save("quality", Saved(values={"a": 1}))
    first.close()
    with pytest.raises(ResumeError) as caught:
        _opened(tmp_path / "w", inputs)
    assert f"with other inputs: {phrase}. Give the earlier inputs" in str(caught.value)
    again = _opened(tmp_path / "w")
    assert again.load("quality").values == {"a": 1}
    again.close()
    fresh = _opened(tmp_path / "w", inputs, restart=True)
    assert fresh.load("quality") is None
    fresh.close()


def test_another_program_from_the_same_file_is_refused(tmp_path):
    (tmp_path / "w").mkdir()
    _opened(tmp_path / "w").close()
    with pytest.raises(ResumeError, match=r"program\.weights was"):
        _opened(tmp_path / "w", program=_program(width=8))


def test_one_process_at_a_time(tmp_path):
    first = _opened(tmp_path / "w")
    with pytest.raises(ResourceError, match="another process is compiling"):
        Workdir(tmp_path / "w", _Listener())
    first.close()
    _opened(tmp_path / "w").close()


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ResourceError, match="neither empty nor a working folder"):
        _opened(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    workdir = _opened(tmp_path / "w")
    (tmp_path / "w" / "notes.txt").write_text("mine too")
    (tmp_path / "w" / "stages" / "more.txt").write_text("mine too")
    workdir.remove()
    workdir.close()
    assert sorted(p.name for p in (tmp_path / "w").rglob("*")) == ["more.txt", "notes.txt", "stages"]


def test_leftovers_of_a_killed_process_are_swept(tmp_path):
    (tmp_path / "w").mkdir()
    _opened(tmp_path / "w").close()
    (tmp_path / "w" / "stages" / ".quality.safetensors.1.tmp").write_bytes(b"half")
    _opened(tmp_path / "w").close()
    assert list((tmp_path / "w" / "stages").iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": "x", "body": {}}', None], ids=str)
def test_a_damaged_record_means_a_fresh_start(tmp_path, text):
    workdir, said = _opened(tmp_path / "w"), _Listener()
    workdir.save("quality", Saved())
    workdir.close()
    path = tmp_path / "w" / "run.json"
    assert json.loads(path.read_text())["body"]["inputs"]["config"]["seed"] == 0
    if text is None:  # an altered value under the old checksum
        record = json.loads(path.read_text())
        record["body"]["inputs"]["config"]["seed"] = 1
        text = json.dumps(record)
    path.write_text(text)
    again = _opened(tmp_path / "w", said=said)
    assert again.load("quality") is None and "run.json is damaged" in said[0]
    again.close()


def test_another_number_of_threads_is_told(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    _opened(tmp_path / "w").close()
    said = _Listener()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    _opened(tmp_path / "w", said=said).close()
    assert "is 99): the file is valid, but its last bits may differ" in said[1]


def test_a_full_disk_keeps_what_was_kept(tmp_path, monkeypatch):
    workdir = _opened(tmp_path / "w")
    workdir.save("calibration", Saved(values={"a": 1}))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"cannot keep calibrate in .*: No space left on device; free space"):
            workdir.save("calibrate", Saved())
        with pytest.raises(ResourceError, match="No space left"):
            workdir.save("calibration", Saved(values={"a": 2}))
    assert sorted(p.name for p in (tmp_path / "w" / "stages").iterdir()) == ["calibration.safetensors"]
    assert workdir.load("calibration").values == {"a": 1}
    workdir.close()


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    with pytest.raises(ResourceError, match=r"cannot work in .*; name a writable folder with --workdir"):
        Workdir(tmp_path / "missing" / "w", _Listener())
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot work in"):
        Workdir(tmp_path / "file", _Listener())


def test_a_folder_made_in_vain_disappears(tmp_path):
    _opened(tmp_path / "w").close()
    assert list(tmp_path.iterdir()) == []
