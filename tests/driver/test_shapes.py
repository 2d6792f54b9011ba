"""Files for several shapes: the same quantization at each, the weights once, and every verb says which shape it took."""

from __future__ import annotations

import dataclasses
import json

import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import edadm_compile
from benchmarks.robustness.qmod_file import header_of, put_together, take_apart, thawed
from edadm_compile.cli import main
from edadm_compile.driver import dry_run
from edadm_compile.driver import shapes as choices
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.driver.device_code import DeviceOptions, check_has_form
from edadm_compile.driver.fingerprint import inputs_of
from edadm_compile.errors import ArtifactError, CaptureError, ConfigError, InputError, TargetError
from edadm_compile.frontend import load_source
from edadm_compile.ir.program import constants_of
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import expected_size, read, to_bytes, write
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.session import from_artifact
from tests.graphs import DDIM, TinyUNet, inputs_for, small_config, source_of

FIRST, SECOND, THIRD = (3, 8, 8), (3, 12, 16), (3, 4, 4)


class Memory:
    """Checkpoints that stay in memory."""

    def __init__(self):
        self.kept, self.restored, self.rejected = {}, {}, []

    def begin(self, program):
        pass

    def load(self, name):
        return self.kept.get(name)

    def save(self, name, saved):
        self.kept[name] = saved

    def reject(self, name, reason):
        self.rejected.append((name, reason))


@pytest.fixture(scope="module")
def memory():
    return Memory()


@pytest.fixture(scope="module")
def source():
    return source_of(TinyUNet(), FIRST, 4, other_shapes=(SECOND, THIRD))


@pytest.fixture(scope="module")
def result(source, memory):
    return compile_source(source, small_config(attention="int8"), quality=False, checkpoints=memory)


@pytest.fixture(scope="module")
def artifact(result):
    return to_artifact(result)


@pytest.fixture(scope="module")
def path(artifact, tmp_path_factory):
    found = tmp_path_factory.mktemp("shapes") / "unet.qmod"
    write(artifact, found)
    return found


@pytest.mark.parametrize("number", [0, 1])
def test_a_further_shape_computes_what_a_file_of_its_own_with_this_quantization_does(
    source, result, path, memory, number
):
    """The other way there: capture at that size, and every stage's result taken from the first shape's compilation."""
    shape = source.other_shapes[number]
    made = set(memory.kept)
    alone = compile_source(source.at(shape), small_config(attention="int8"), quality=False, checkpoints=memory)
    assert set(memory.kept) == made and not memory.rejected  # nothing was measured or learned again
    loaded = read(path)
    for ours, theirs in zip(
        (loaded.others[number].qdq, loaded.others[number].lowered), (alone.qdq, alone.lowered), strict=True
    ):
        inputs = inputs_for(theirs)
        assert inputs[0].shape[1:] == shape and torch.equal(ours(*inputs), theirs(*inputs))
        a, b = constants_of(ours), constants_of(theirs)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weights_are_stored_and_held_once(source, artifact, path):
    loaded = read(path)
    alone = to_bytes(loaded.at(FIRST))
    assert path.stat().st_size - len(alone) < 4096
    assert take_apart(path.read_bytes()).tensors.keys() == take_apart(alone).tensors.keys()
    first = constants_of(loaded.lowered)
    for other in loaded.others:
        for name, value in constants_of(other.lowered).items():
            assert value.data_ptr() == first[name].data_ptr()


def test_one_shape_says_nothing_of_others(artifact):
    assert b'"shapes"' not in to_bytes(artifact.at(FIRST))


def test_it_is_read_as_it_was_written(artifact, path):
    assert to_bytes(artifact) == path.read_bytes() == to_bytes(read(path))


@pytest.mark.parametrize("engine", ["reference", "onnxruntime"])
def test_one_model_takes_every_shape(path, engine):
    model = edadm_compile.load(path, engine=engine)
    assert model.shapes == [FIRST, SECOND, THIRD] and list(model._engines) == [FIRST]
    for shape in (SECOND, FIRST, THIRD, SECOND):
        alone = edadm_compile.load(path, engine=engine, shape=shape)
        inputs = inputs_for(alone.artifact.lowered)
        found = model(*inputs)
        assert found.shape == inputs[0].shape and torch.equal(found, alone(*inputs))
    assert {e.name for e in model._engines.values()} == {engine} and len(model._engines) == 3
    assert "3,12,16; 3,4,4" in repr(model) and "3,12,16" in model._repr_html_()


def test_a_shape_that_was_not_compiled_gets_the_list(path):
    model = edadm_compile.load(path, engine="reference")
    message = (
        "input 'x': shape 3,24,24 was not compiled; the file has 3,8,8; 3,12,16; 3,4,4: take one of them, or compile "
        "again with --shape 3,8,8 --shape 3,12,16 --shape 3,4,4 --shape 3,24,24"
    )
    with pytest.raises(InputError) as caught:
        model(torch.zeros(1, 3, 24, 24), torch.zeros(1, dtype=torch.int64))
    assert str(caught.value) == message
    with pytest.raises(InputError, match="shape 3,24,24 was not compiled; the file has 3,8,8; 3,12,16"):
        edadm_compile.load(path, shape=(3, 24, 24))
    with pytest.raises(InputError, match=r"'x': got shape \[1, 4, 8, 8\], expected \[1, 3, 8, 8\]"):
        model(torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.int64))


# networks that are another graph at another size


class Positions(nn.Module):
    """Adds the place of each column, a constant of the size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x + torch.linspace(-1, 1, x.shape[-1]))


class Learned(nn.Module):
    """Learned positions for one size."""

    def __init__(self):
        super().__init__()
        self.conv, self.places = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.randn(1, 3, 8, 8))

    def forward(self, x, t):
        return self.conv(x + self.places)


class Longer(nn.Module):
    """One more layer for large images."""

    def __init__(self):
        super().__init__()
        self.conv, self.more = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv(x)
        return h + self.more(h) if x.shape[-1] > 8 else h


class Swapped(nn.Module):
    """What is added to what depends on the size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv(x)
        return h - x if x.shape[-1] > 8 else x - h


@pytest.mark.parametrize(
    ("module", "message"),
    [(Positions, "first at node .*: the constant .* depends on the shape"), (Learned, "--shape 3,16,16: torch.export cannot"),
     (Longer, "first at node .*: (it is|its|it reads|the graph has)"), (Swapped, "first at node .*: it reads other values")],
)  # fmt: skip
def test_another_graph_is_refused_before_the_work(module, message):
    source = source_of(module(), FIRST, 4, other_shapes=((3, 16, 16),))
    memory = Memory()
    with pytest.raises(CaptureError, match=message) as caught:
        compile_source(source, small_config(), quality=False, checkpoints=memory)
    assert "--shape 3,16,16" in str(caught.value) and not memory.kept


@pytest.mark.parametrize(
    ("shapes", "message"),
    [([(3, 8, 8)], "--shape 3,8,8 is given twice"), ([(3, 4, 4), (3, 4, 4)], "--shape 3,4,4 is given twice"),
     ([(4, 16, 16)], "got 4 channels, the first shape has 3")],
)  # fmt: skip
def test_shapes_that_do_not_go_together(shapes, message):
    with pytest.raises(InputError, match=message):
        source_of(TinyUNet(), FIRST, 4, other_shapes=shapes)


def test_an_archive_has_the_graph_of_one_shape(tmp_path, source):
    exported, _ = source.export()
    torch.export.save(exported, tmp_path / "a.pt2")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(DDIM))
    from edadm_compile.frontend import LoadOptions

    with pytest.raises(InputError, match=r"3,16,16: a torch\.export archive holds the graph of one shape"):
        load_source(tmp_path / "a.pt2", LoadOptions(steps=4, other_shapes=((3, 16, 16),)))


def test_the_time_path_must_not_depend_on_the_size():
    class Sized(TinyUNet):
        def forward(self, x, t):
            return super().forward(x, t * (2 if x.shape[-1] > 8 else 1))

    with pytest.raises(CaptureError, match="--shape 3,16,16: what the network computes from the timestep alone"):
        compile_source(source_of(Sized(), FIRST, 4, other_shapes=((3, 16, 16),)), small_config(), quality=False)


# GPU code


def test_gpu_code_is_refused_before_the_work(source, path, tmp_path):
    with pytest.raises(ConfigError, match="3 shapes and targets sm_90 exclude each other"):
        compile_model(source, small_config(), output=tmp_path / "a.qmod", targets="sm_90")
    with pytest.raises(InputError, match=r"GPU code: the file has 3 shapes \(3,8,8; 3,12,16; 3,4,4\)"):
        check_has_form(read(path))
    told = []
    assert choices.targets_for({"shape": ("3,8,8", "3,4,4")}, None, told.append) == "none" and len(told) == 1
    assert choices.targets_for({"shape": ("3,8,8", "3,4,4")}, "sm_90", told.append) == "sm_90" and len(told) == 1
    assert choices.targets_for({"shape": ("3,8,8",)}, None, told.append) is None and len(told) == 1


def test_the_gpu_engine_says_why_there_is_no_code(path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TargetError, match="the file has programs for 3 shapes and so no GPU code"):
        from_artifact(read(path), "cuda")


# files made to do harm


@pytest.fixture(scope="module")
def frozen(path):
    return take_apart(path.read_bytes()).frozen()


def _entry(parts):
    return parts.manifest["shapes"][0]


def _first_change(parts):
    return next(change for change in _entry(parts)["programs"]["lowered"])


def _renamed_input(parts):
    _entry(parts)["signature"]["inputs"][1]["name"] = "time"


def _reads_another_node(parts):
    """The first argument of a changed operator is a value of another shape."""
    change = _first_change(parts)
    change[1][0] = "%0"


def _constant_instead(parts):
    """An entry that changes which constant a node is."""
    nodes = parts.manifest["programs"]["lowered"]
    index = next(i for i, node in enumerate(nodes) if node[0] == "a")
    _entry(parts)["programs"]["lowered"].insert(0, [index, []])


def _huge(parts):
    _entry(parts)["signature"]["inputs"][0]["shape"] = [3, 8192, 8192]


def _wrong_size(parts):
    """A size that the numbers of the program do not fit."""
    _entry(parts)["signature"]["inputs"][0]["shape"] = [3, 20, 20]


def _with_gpu_code(parts):
    parts.manifest["device"] = {"cubins": {}, "plans": []}


HARM = [
    (lambda p: p.manifest.update(shapes=3), "shapes: expected a list of at most"),
    (lambda p: p.manifest.update(shapes=p.manifest["shapes"] * 40), "shapes: expected a list of at most 32"),
    (lambda p: p.manifest.update(shapes=[3]), "shapes: entry 0 is malformed"),
    (lambda p: p.manifest["shapes"].append(p.manifest["shapes"][0]), "entry 2 repeats the shape 3,12,16"),
    (lambda p: _entry(p).update(programs=3), "entry 0 is malformed"),
    (lambda p: _entry(p).update(more=3), "entry 0 is malformed"),
    (lambda p: _entry(p)["programs"].pop("qdq"), "entry 0 has not the programs"),
    (lambda p: _entry(p)["programs"].update(qdq=3), "entry 0, qdq program: expected a list"),
    (lambda p: _entry(p)["programs"].update(lowered=[3]), "a changed node is malformed"),
    (lambda p: _first_change(p).__setitem__(0, 10**6), "changed node 1000000 is out of order, or there is none"),
    (lambda p: _first_change(p).__setitem__(0, -1), "changed node -1 is out of order"),
    (lambda p: _entry(p)["programs"]["lowered"].append(_first_change(p)), "out of order"),
    (lambda p: _first_change(p).append({"a": 1}), "takes no such change|is malformed"),
    (lambda p: _first_change(p)[1].append(1), "differs in more than numbers"),
    (_reads_another_node, "differs in more than numbers"),
    (_constant_instead, "takes no such change"),
    (lambda p: _entry(p)["programs"].update(lowered=[]), "program"),
    (_renamed_input, "entry 0 has other inputs than the first shape"),
    (lambda p: _entry(p)["signature"].update(output="sample"), "entry 0 has other inputs than the first shape"),
    (lambda p: _entry(p)["signature"]["inputs"][0].update(shape=[4, 8, 8]), "entry 0 has other inputs"),
    (lambda p: _entry(p)["signature"].update(max_batch=0), "signature: batches"),
    (_huge, "program"),
    (_wrong_size, "program"),
    (_with_gpu_code, "shapes: GPU code is for files of one shape"),
]


@pytest.mark.parametrize("number", range(len(HARM)))
def test_hostile_entries_are_refused(frozen, tmp_path, number):
    harm, message = HARM[number]
    parts = thawed(frozen)
    harm(parts)
    (tmp_path / "a.qmod").write_bytes(put_together(*header_of(parts)))
    with pytest.raises(ArtifactError, match=message) as caught:
        read(tmp_path / "a.qmod", Limits(value=1 << 22))
    assert "a.qmod" in str(caught.value)


def test_the_untouched_entries_are_read(frozen, tmp_path):
    (tmp_path / "a.qmod").write_bytes(put_together(*header_of(thawed(frozen))))
    assert read(tmp_path / "a.qmod", Limits(value=1 << 22)).shapes == [FIRST, SECOND, THIRD]


# what else depends on the shapes


def test_a_work_folder_belongs_to_its_shapes(source):
    config = small_config()
    assert inputs_of(source, config)["other_shapes"] == [list(SECOND), list(THIRD)]
    assert "other_shapes" not in inputs_of(source.at(FIRST), config)


def test_a_dry_run_counts_them(artifact, monkeypatch):
    results, make = [], dry_run._result
    monkeypatch.setattr(dry_run, "_result", lambda *arguments: results.append(make(*arguments)) or results[-1])
    plan = dry_run.estimate(source_of(TinyUNet(), FIRST, 4, other_shapes=(THIRD,)), small_config(), DeviceOptions(()))
    assert plan["shapes"] == [list(FIRST), list(THIRD)]
    assert [lowered.signature.inputs[0].shape for _, lowered in results[0].others] == [THIRD]
    one = artifact.at(FIRST)
    grown = len(to_bytes(artifact)) - len(to_bytes(one))
    assert grown > 8 and abs(expected_size(artifact) - expected_size(one) - grown) <= 8  # the header is filled up to 8


# the verbs


REFERENCE = ["--factory", "tests.graphs:TinyUNet"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.save(TinyUNet().state_dict(), folder / "tiny.pt")
    (folder / "scheduler_config.json").write_text(json.dumps(DDIM))
    return folder / "tiny.pt"


def _run(*arguments):
    found = CliRunner().invoke(main, [str(a) for a in arguments])
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.fixture(scope="module")
def compiled(checkpoint):
    """A file made by the command, and its summary."""
    output = checkpoint.with_suffix(".qmod")
    summary = _run(
        "compile", checkpoint, *REFERENCE, "--shape", "3,8,8", "--shape", "3,12,16", "--steps", 4, "--iters", 2,
        "--calib-samples", 8, "-o", output, "--json", "-q",
    )  # fmt: skip
    return output, json.loads(summary)


def test_compile_lists_the_shapes(compiled):
    path, summary = compiled
    assert summary["shapes"] == [[3, 8, 8], [3, 12, 16]] and summary["device"] is None
    assert read(path).shapes == [FIRST, SECOND]
    assert json.loads(_run("inspect", path, "--json"))["shapes"] == [[3, 8, 8], [3, 12, 16]]
    text = _run("inspect", path)
    assert "shapes 3,8,8; 3,12,16; calibrated and measured at the first" in text and "made for files of one" in text


def test_verbs_take_one_shape_and_say_which(compiled, checkpoint, tmp_path):
    path, _ = compiled
    asked = ["--shape", "3,12,16"]
    reference = ["--reference", checkpoint, *REFERENCE]
    told = {}
    for arguments in (
        ("verify", path, "-n", 1, *reference),  # without --shape: the first
        ("evaluate", path, "-n", 2, "--engine", "reference", *reference, *asked),
        ("sample", path, "-n", 2, "-o", tmp_path / "grid.png", "--engine", "reference", *reference, *asked),
        ("bench", path, "--repeats", 2, "--device", "cpu", *asked),
        ("export", path, *asked),
    ):
        result = json.loads(_run(*arguments, "--json"))
        assert result["shapes"] == [[3, 8, 8], [3, 12, 16]], arguments[0]
        told[arguments[0]] = tuple(result["shape"])
    assert told == {"verify": FIRST, "evaluate": SECOND, "sample": SECOND, "bench": SECOND, "export": SECOND}
    dims = onnx.load(path.with_name(f"{path.stem}_3x12x16.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 12, 16]
    _run("export", path, "--no-check", "-q")
    dims = onnx.load(path.with_name(f"{path.stem}_3x8x8.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims[1:]] == [3, 8, 8]


def test_a_table_names_the_shape(compiled, checkpoint):
    path, _ = compiled
    text = _run("verify", path, "-n", 1, "--reference", checkpoint, *REFERENCE, "--shape", "3,12,16")
    assert "shape 3,12,16; the file also has 3,8,8 (--shape)" in text and "contract holds" in text


def test_a_report_is_about_one_shape(compiled, checkpoint, tmp_path):
    path, _ = compiled
    _run("report", path, "-o", tmp_path / "a.html", "--shape", "3,12,16", "-q")
    text = (tmp_path / "a.html").read_text()
    assert "figures of this page are for 3,12,16, one of 2 shapes in the file: 3,8,8; 3,12,16" in text
    assert "what was recorded while compiling is of 3,8,8" in text


def test_new_targets_keep_the_shapes(compiled, tmp_path):
    path, _ = compiled
    _run("target", path, "--targets", "none", "-o", tmp_path / "a.qmod", "-q")
    assert (tmp_path / "a.qmod").read_bytes() == path.read_bytes()
    found = CliRunner().invoke(main, ["target", str(path), "--targets", "sm_90", "-o", str(tmp_path / "b.qmod")])
    assert found.exit_code == 2 and "GPU code: the file has 2 shapes" in found.stderr


def test_a_pipeline_reads_the_first_size(artifact):
    """diffusers takes the default size from the configuration."""
    source = {"class": "UNet2DModel", "parameters": 1, "config": {"sample_size": 8}}
    model = from_artifact(
        dataclasses.replace(artifact, manifest={**artifact.manifest, "source": source}), engine="reference"
    )
    assert model.config.sample_size == 8 and model.signature.inputs[0].shape == FIRST
    assert model(torch.zeros(1, *SECOND), 3).shape == (1, *SECOND)
