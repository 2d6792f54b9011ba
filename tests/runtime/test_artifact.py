import copy
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import get_constant, layers
from edadm_compile.runtime.artifact import FORMAT, digest, read, read_manifest, to_bytes, write
from tests.graphs import inputs_for


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def parts(data, tmp_path_factory):
    """Manifest and tensors of a good file."""
    path = _write(tmp_path_factory.mktemp("parts") / "good.qmod", data)
    with safe_open(path, framework="pt") as file:
        return read_manifest(path), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _forged(path: Path, manifest, tensors) -> Path:
    """A file with correct checksums around any manifest."""
    if isinstance(manifest, dict) and isinstance(manifest.get("tensors"), dict):
        manifest["tensors"]["sha256"] = digest(dict(sorted(tensors.items())))
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return _write(
        path,
        save(dict(sorted(tensors.items())), metadata={"edadm": f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"}),
    )


def test_a_file_holds_the_programs_exactly(artifact, data, tmp_path):
    found = read(_write(tmp_path / "a.qmod", data))
    for ours, theirs in ((artifact.qdq, found.qdq), (artifact.lowered, found.lowered)):
        inputs = inputs_for(ours)
        for t in (inputs[1], torch.tensor([75, 50, 0])):  # beside the tables and in them
            arguments = [inputs[0], t, *inputs[2:]]
            with torch.no_grad():
                assert torch.equal(theirs(*arguments), ours(*arguments))
        assert layers(theirs) == layers(artifact.lowered)
        assert (theirs.signature, theirs.sampler, theirs.notes) == (ours.signature, ours.sampler, ours.notes)
        for node in theirs.graph_module.graph.nodes:
            if node.op == "get_attr":
                a, b = (get_constant(p.graph_module, str(node.target)) for p in (ours, theirs))
                assert a.dtype == b.dtype and torch.equal(a, b)
    assert (
        found.manifest["config"] == json.loads(json.dumps(artifact.manifest["config"]))
        and found.manifest["format"] == FORMAT
    )


def test_the_same_artifact_gives_the_same_bytes(artifact, data, tmp_path):
    assert to_bytes(artifact) == data
    again = read(_write(tmp_path / "a.qmod", data))
    assert to_bytes(again) == data


def test_a_forged_copy_of_a_good_file_is_good(parts, tmp_path):
    manifest, tensors = copy.deepcopy(parts)
    read(_forged(tmp_path / "a.qmod", manifest, tensors))  # what the tests below change is what fails


def test_writing_leaves_nothing_else_behind(artifact, data, tmp_path):
    assert write(artifact, tmp_path / "a.qmod") == len(data)
    assert [p.name for p in tmp_path.iterdir()] == ["a.qmod"] and (tmp_path / "a.qmod").read_bytes() == data


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"]
)
def test_a_failed_write_leaves_the_old_file(artifact, tmp_path, monkeypatch, error):
    path = _write(tmp_path / "a.qmod", b"old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((ArtifactError, KeyboardInterrupt)) as caught:
        write(artifact, path)
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.qmod"]


def test_the_new_file_appears_at_once_or_not_at_all(artifact, tmp_path, monkeypatch):
    path = _write(tmp_path / "a.qmod", b"old")

    def fail(self, target):
        assert target == path and self.parent == path.parent and self.read_bytes() == to_bytes(artifact)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="Input/output error"):
        write(artifact, path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.qmod"]


def test_a_missing_folder_is_explained(artifact, tmp_path):
    with pytest.raises(ArtifactError, match="cannot write"):
        write(artifact, tmp_path / "nowhere" / "a.qmod")


def test_every_truncation_is_noticed(data, tmp_path):
    path = tmp_path / "a.qmod"
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1, *range(0, len(data), len(data) // 60)}
    for length in sorted(lengths):
        _write(path, data[:length])
        with pytest.raises(ArtifactError, match=r"a\.qmod"):
            read(path)


def test_appended_bytes_are_noticed(data, tmp_path):
    with pytest.raises(ArtifactError):
        read(_write(tmp_path / "a.qmod", data + b"\0"))


def test_every_flipped_byte_is_noticed(data, tmp_path):
    path = tmp_path / "a.qmod"
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    positions = {*range(16), header - 1, header, len(data) - 1}
    positions |= set(torch.randint(0, header, (180,), generator=generator).tolist())
    positions |= set(torch.randint(header, len(data), (180,), generator=generator).tolist())
    assert len(positions) >= 300
    for number, position in enumerate(sorted(positions)):
        changed = bytearray(data)
        changed[position] ^= (0xFF, 0x01, 0x80)[number % 3]
        _write(path, bytes(changed))
        with pytest.raises(ArtifactError):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0", b"plain text, nothing else\n" * 10, b"\xff" * 64, b"\0" * 64, b"PK\x03\x04" + b"\0" * 100,
        (2**63).to_bytes(8, "little") + b"{}", b"{}",
    ],
    ids=["empty", "one byte", "text", "ones", "zeros", "zip", "absurd header", "json"],
)  # fmt: skip
def test_foreign_files_are_refused(content, tmp_path):
    with pytest.raises(ArtifactError, match=r"a\.qmod"):
        read(_write(tmp_path / "a.qmod", content))


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "missing.qmod", tmp_path):
        with pytest.raises(ArtifactError, match="cannot read"):
            read(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"edadm": ""}, {"edadm": "abc\n{}"}], ids=str)
def test_other_safetensors_files_are_refused(metadata, tmp_path):
    with pytest.raises(ArtifactError):
        read(_write(tmp_path / "a.qmod", save({"w": torch.ones(3)}, metadata=metadata)))


def test_a_newer_format_is_named(parts, tmp_path):
    manifest, tensors = copy.deepcopy(parts)
    manifest["format"] = "edadm.qmod/999"
    with pytest.raises(ArtifactError, match=r"edadm\.qmod/999.*recompile"):
        read(_forged(tmp_path / "a.qmod", manifest, tensors))


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"text"', "{", "[" * 100_000, "NaN"], ids=lambda t: t[:8])
def test_a_manifest_of_another_kind_is_refused(parts, text, tmp_path):
    with pytest.raises(ArtifactError):
        read(_forged(tmp_path / "a.qmod", text, parts[1]))


def _operator(manifest, dialect, name):
    return next(r for r in manifest["programs"][dialect] if r[1] == name)


def _drop_key(*path):
    def change(manifest, tensors):
        target = manifest
        for key in path[:-1]:
            target = target[key]
        del target[path[-1]]

    return change


def _put(value, *path):
    def change(manifest, tensors):
        target = manifest
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


def _swap_operator(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qlinear.default")[1] = "aten.silu.default"


def _forbidden_operator(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qlinear.default")[1] = "aten.randn_like.default"


def _simulated_operator(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qlinear.default")[1] = "edadm.dequantize_weight.default"


def _bad_stride(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qconv2d.default")[2][5] = [0, 0]


def _bad_channels(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qconv2d.default")[2][10][0] += 1


def _too_few_arguments(manifest, tensors):
    del _operator(manifest, "lowered", "edadm.qconv2d.default")[2][4:]


def _text_argument(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qconv2d.default")[2][4] = "text"


def _unknown_keyword(manifest, tensors):
    _operator(manifest, "lowered", "edadm.qconv2d.default")[3] = {"nonsense": 1}


def _missing_tensor(manifest, tensors):
    del tensors[next(name for name in tensors if name.endswith("weight_q"))]


def _short_table(manifest, tensors):
    tensors["time.keys"] = tensors["time.keys"][:-1].contiguous()


def _dead_constant(manifest, tensors):
    name = next(name for name in tensors if name.endswith("weight_q"))
    manifest["programs"]["lowered"].insert(0, ["a", name, []])


def _renamed_input(manifest, tensors):
    next(r for r in manifest["programs"]["lowered"] if r[0] == "p")[1] = "y"


def _silent_float_layer(manifest, tensors):
    for record in manifest["layers"]:
        record["note"] = ""
    for program in manifest["programs"].values():
        for record in program:
            if record[1] == "edadm.qconv2d.default":
                record[1] = "aten.conv2d.default"


_CHANGES = {
    **{
        f"no {key}": _drop_key(key)
        for key in ("signature", "sampler", "programs", "layers", "time", "tensors", "notes")
    },
    "no lowered program": _drop_key("programs", "lowered"),
    "no qdq program": _drop_key("programs", "qdq"),
    "no inputs": _put([], "signature", "inputs"),
    "inputs no list": _put(3, "signature", "inputs"),
    "unknown dtype": _put("float33", "signature", "inputs", 0, "dtype"),
    "dtype is a function": _put("load", "signature", "inputs", 0, "dtype"),
    "negative size": _put([-3, 8, 8], "signature", "inputs", 0, "shape"),
    "absurd size": _put([3, 1 << 20, 1 << 20], "signature", "inputs", 0, "shape"),
    "other size": _put([4, 8, 8], "signature", "inputs", 0, "shape"),
    "roles turned": _put("t", "signature", "inputs", 0, "role"),
    "batch zero": _put(0, "signature", "max_batch"),
    "batch is text": _put("8", "signature", "max_batch"),
    "lowest batch above": _put(10**6, "signature", "min_batch"),
    "unknown output": _put("image", "signature", "output"),
    "unknown signature entry": _put(1, "signature", "extra"),
    "sampler without steps": _drop_key("sampler", "steps"),
    "steps are text": _put("4", "sampler", "steps"),
    "scheduler is text": _put("DDIM", "sampler", "scheduler"),
    "notes are a number": _put(3, "notes"),
    "tensor record is text": _put("a", "tensors"),
    "widened is text": _put("a", "tensors", "float32_stored_as_float16"),
    "widened holds lists": _put([["a"]], "tensors", "float32_stored_as_float16"),
    "layers are a number": _put(3, "layers"),
    "layer without a name": _drop_key("layers", 0, "name"),
    "program is text": _put("a", "programs", "lowered"),
    "time is text": _put("a", "time"),
    "time without tables": _drop_key("time", "tables"),
    "unknown table": _put(["time_99"], "time", "tables"),
    "path is a number": _put(3, "time", "path"),
    "path calls integers": _put(
        [["p", "t", []], ["f", "edadm.qlinear.default", ["%0"]], ["o", "output", [["%1"]]]], "time", "path"
    ),
    "path with two inputs": _put([["p", "t", []], ["p", "u", []], ["o", "output", [["%1"]]]], "time", "path"),
    "path computes too little": _put([["p", "t", []], ["o", "output", [["%0"]]]], "time", "path"),
    "other operator": _swap_operator,
    "forbidden operator": _forbidden_operator,
    "simulated operator in the lowered program": _simulated_operator,
    "stride zero": _bad_stride,
    "channels that do not fit": _bad_channels,
    "too few arguments": _too_few_arguments,
    "text for a number": _text_argument,
    "unknown keyword": _unknown_keyword,
    "missing tensor": _missing_tensor,
    "short table": _short_table,
    "dead constant": _dead_constant,
    "renamed input": _renamed_input,
    "float layer without a reason": _silent_float_layer,
}


@pytest.mark.parametrize("name", list(_CHANGES))
def test_a_wrong_manifest_is_refused_even_with_a_correct_checksum(name, parts, tmp_path):
    manifest, tensors = copy.deepcopy(parts)
    _CHANGES[name](manifest, tensors)
    with pytest.raises(ArtifactError):
        read(_forged(tmp_path / "a.qmod", manifest, tensors))


def test_exchanged_tensors_are_noticed(parts, tmp_path):
    """Tensors of the right names and shapes, with the digest of the originals."""
    manifest, tensors = copy.deepcopy(parts)
    name = next(n for n in tensors if n.endswith("weight_q"))
    recorded = manifest["tensors"]["sha256"]
    tensors[name] = tensors[name].roll(1, 0)
    text = json.dumps(manifest)
    assert json.loads(text)["tensors"]["sha256"] == recorded
    path = _write(
        tmp_path / "a.qmod",
        save(dict(sorted(tensors.items())), metadata={"edadm": f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"}),
    )
    with pytest.raises(ArtifactError, match="do not match their checksum"):
        read(path)


def test_float32_is_stored_as_float16_only_where_that_loses_nothing(artifact, parts):
    manifest, tensors = parts
    for name in manifest["tensors"]["float32_stored_as_float16"]:
        assert tensors[name].dtype == torch.float16
    multipliers = [n for n in tensors if n.endswith("multiplier")]
    assert multipliers and all(tensors[n].dtype == torch.float32 for n in multipliers)
