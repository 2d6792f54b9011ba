"""Files that were made to do harm, with correct checksums: each is refused with a sentence, before anything runs."""

import copy
import json
import os
import struct

import pytest
import torch

from benchmarks.robustness.mutate_qmod import _EVIL
from benchmarks.robustness.qmod_file import header_of, put_together, take_apart, thawed
from edadm_compile.errors import ArtifactError
from edadm_compile.report import tables
from edadm_compile.runtime import json_text
from edadm_compile.runtime.artifact import read
from edadm_compile.runtime.limits import DEFAULT, Limits
from edadm_compile.runtime.session import from_artifact, load

SMALL = Limits(value=1 << 20)


@pytest.fixture(scope="module")
def frozen(small_files):
    return take_apart(small_files["chain"].read_bytes()).frozen()


@pytest.fixture
def parts(frozen):
    return thawed(frozen)


@pytest.fixture
def refused(tmp_path):
    """Check that parts make a file that is refused with a message."""

    def check(parts, message, limits=DEFAULT):
        (tmp_path / "a.qmod").write_bytes(put_together(*header_of(parts)))
        with pytest.raises(ArtifactError, match=message) as caught:
            read(tmp_path / "a.qmod", limits)
        assert "a.qmod" in str(caught.value) and "Traceback" not in str(caught.value)

    return check


def test_the_untouched_parts_make_a_good_file(parts, tmp_path):
    (tmp_path / "a.qmod").write_bytes(put_together(*header_of(parts)))
    artifact = read(tmp_path / "a.qmod")
    assert artifact.device is not None
    tables.print_inspect(tables.inspect_report(artifact, 1))
    assert read(tmp_path / "a.qmod", device_code=False).device is None


# the container


def _container(parts, change):
    header, body = header_of(parts)
    return put_together(*change(header, body))


def _swap_offsets(header, body):
    first, second = [n for n in header if n.endswith("weight_q")]
    header[first]["data_offsets"], header[second]["data_offsets"] = (
        header[second]["data_offsets"],
        header[first]["data_offsets"],
    )
    return header, body


def _hole(header, body):
    last = max((r for n, r in header.items() if n != "__metadata__"), key=lambda r: r["data_offsets"][1])
    last["data_offsets"] = [n + 8 for n in last["data_offsets"]]
    return header, body + bytes(8)


def _overlap(header, body):
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    size = header[names[0]]["data_offsets"][1]
    extra = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return {**header, "another": extra}, body


def _twice(header, body):
    name = next(n for n in header if n.endswith("weight_q"))
    return (json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}").encode(), body


def _type(header, body):
    next(r for n, r in header.items() if n != "__metadata__")["dtype"] = "F8_E4M3"
    return header, body


def _huge_shape(header, body):
    next(r for n, r in header.items() if n.endswith("weight_q"))["shape"] = [1 << 61, 8]
    return header, body


@pytest.mark.parametrize(
    ("change", "message"),
    [(_swap_offsets, "bytes for|checksum"), (_hole, "hole"), (_overlap, "overlaps"), (_twice, "twice"), (_type, "type 'F8_E4M3'"),
     (_huge_shape, "bytes for"), (lambda h, b: (h, b + b"x"), "no tensor"), (lambda h, b: ([h], b), "no table"),
     (lambda h, b: (b"\xff" * 64, b), "not text"), (lambda h, b: (b"[" * 100_000, b), "nested|malformed")],
    ids=lambda v: getattr(v, "__name__", str(v)),
)  # fmt: skip
def test_containers(parts, tmp_path, change, message):
    path = tmp_path / "a.qmod"
    path.write_bytes(_container(parts, change))
    with pytest.raises(ArtifactError, match=message):
        read(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.qmod")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read(tmp_path / "a.qmod")


def test_a_header_of_absurd_length_is_not_read(tmp_path):
    path = tmp_path / "a.qmod"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 1 << 40))
        stream.truncate(1 << 41)  # a sparse file: two terabytes that are not there
    with pytest.raises(ArtifactError, match="header of"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1, "a": 2}', "twice"), ("[NaN]", "NaN"), ("[" + "1," * 100 + "1]", "more than"), ("[" * 70 + "]" * 70, "deeper"),
     ('["\\u001b[2J"]', "control"), ('["\\r"]', "control"), ("[" + "9" * 5000 + "]", "digits"), ("[1", "malformed")],
)  # fmt: skip
def test_json(text, message):
    with pytest.raises(ArtifactError, match=message):
        json_text.parse(text, "a", Limits(values=90))
    assert json_text.parse('{"a": ["\\\\u001b", "\\n\\té", 1.5]}', "a", DEFAULT) == {"a": ["\\u001b", "\n\té", 1.5]}


# programs


#: They run, and do nothing but give wrong predictions.
HARMLESS = ("aten.div.Tensor", "aten.remainder.Scalar", "aten.tril.default", "aten.index_select.default")


@pytest.mark.parametrize("node", [n for n in _EVIL if n[1] not in HARMLESS], ids=lambda n: f"{n[1]} {str(n[2])[:30]}")
def test_nodes_that_would_take_memory_or_time(parts, refused, node):
    """Each computes the output of the lowered program, or is one more node of it."""
    nodes = parts.manifest["programs"]["lowered"]
    node = copy.deepcopy(node)
    inputs = [i for i, record in enumerate(nodes) if record[0] == "p"]
    node[2] = json.loads(json.dumps(node[2]).replace('"%0"', f'"%{inputs[0]}"').replace('"%1"', f'"%{inputs[1]}"'))
    nodes.insert(len(nodes) - 1, node)
    nodes[-1][2] = [f"%{len(nodes) - 2}"]
    refused(parts, "program", SMALL)


def _quantizer(parts, which):
    return next(n for n in parts.tensors if n.startswith("activations.") and n.endswith(which))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales(parts, refused, value):
    parts.tensors[_quantizer(parts, ".scale")].data = struct.pack("<f", value)
    refused(parts, "scale is not a positive finite number")


@pytest.mark.parametrize("value", [128.0, -129.0, 0.5, float("nan")])
def test_zero_points(parts, refused, value):
    parts.tensors[_quantizer(parts, ".zero_point")].data = struct.pack("<f", value)
    refused(parts, "zero point")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [(4, 128, "pad code"), (4, True, "pad code"), (5, [0, 1], "stride"), (5, [1], "stride"), (6, [-1, 1], "padding"),
     (6, [1 << 40, 1], "padding"), (6, [1 << 20, 1 << 20], "bytes, allowed"), (7, [0, 1], "dilation"), (8, 0, "groups"), (8, 3, "groups"),
     (9, 16, "width"), (9, 9, "width"), (10, [4, 1, 3, 0], "weight shape"), (10, [4, 1, 3], "weight shape"), (2, "%0", "packed|not a constant|multiplier")],
)  # fmt: skip
def test_arguments_of_convolutions(parts, refused, position, value, message):
    nodes = parts.manifest["programs"]["lowered"]
    next(n for n in nodes if n[1] == "edadm.qconv2d.default")[2][position] = value
    refused(parts, message, SMALL)


def test_a_padding_that_a_dilation_takes_back_is_still_memory(parts, refused):
    """The output is as small as before; what the kernel pads is not."""
    args = next(n for n in parts.manifest["programs"]["lowered"] if n[1] == "edadm.qconv2d.default")[2]
    args[6], args[7] = [5000, 5000], [5000, 5000]
    refused(parts, "workspace", SMALL)


def test_the_bound_on_values_is_the_callers(parts, tmp_path):
    path = tmp_path / "a.qmod"
    path.write_bytes(put_together(*header_of(parts)))
    load(path, engine="reference", limits=Limits(value=1 << 20))
    with pytest.raises(ArtifactError, match="allowed 64"):
        load(path, engine="reference", limits=Limits(value=64))


def test_other_entries(parts, frozen, refused):
    manifest = parts.manifest
    manifest["sampler"]["steps"] = 1 << 40
    refused(parts, "sampler")
    for path, value, message in (
        (("sampler", "scheduler", "num_train_timesteps"), 1 << 40, "sampler"),
        (("time", "path_outputs"), ["x"], "time tables"),
        (("signature", "inputs", 1, "name"), "x", "one name"),
        (("signature", "inputs", 0, "dtype"), "load", "absurd"),
        (("config", "seed"), "0", "'config'"),
        (("source", "parameters"), None, "'source'"),
        (("average_bits",), "4", "'average_bits'"),
        (("layers", 0, "note"), 3, "layer record"),
        (("notes",), ["\x1b[31mred"], "control"),
    ):
        changed = thawed(frozen)
        target = changed.manifest
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        refused(changed, message)


def test_keys_that_do_not_ascend(parts, refused):
    keys = parts.tensors["time.keys"]
    keys.data = keys.data[::-1]  # big-endian doubles in reverse order: nonsense
    refused(parts, "time tables")


def test_hidden_tensors(parts, refused):
    parts.tensors["spare"] = copy.copy(parts.tensors["time.keys"])
    refused(parts, "no program reads, such as 'spare'")


def test_what_only_fails_with_values_is_a_sentence_too(parts, tmp_path):
    """An index outside of a table: shapes say nothing of it."""
    nodes = parts.manifest["programs"]["lowered"]
    start = len(nodes) - 1
    t = next(i for i, n in enumerate(nodes) if n[1] == "t")
    nodes[start:] = [
        ["f", "aten.add.Scalar", [f"%{t}", 1000]],
        ["f", "aten._to_copy.default", [f"%{start}"], {"dtype": {"dtype": "int64"}}],
        ["f", "aten.index_select.default", [nodes[-1][2][0], 3, f"%{start + 1}"]],
        ["o", "output", [f"%{start + 2}"]],
    ]
    (tmp_path / "a.qmod").write_bytes(put_together(*header_of(parts)))
    artifact = read(tmp_path / "a.qmod")
    with pytest.raises(ArtifactError, match=r"cannot run.*index"):
        from_artifact(artifact, engine="reference").predict(torch.zeros(1, 1, 4, 4), torch.zeros(1))


def test_names_are_no_markup(parts, tmp_path, capsys):
    parts.manifest["layers"][0]["note"] = "[/red] [link=http://x]"
    (tmp_path / "a.qmod").write_bytes(put_together(*header_of(parts)))
    tables.print_inspect(tables.inspect_report(read(tmp_path / "a.qmod"), 1))
    assert "[/red]" in capsys.readouterr().out


# GPU code


def _first_plan(parts):
    return next(iter(parts.plans))


def _changed_plan(parts, change):
    name = _first_plan(parts)
    parts.changed.add(name)
    change(parts.plans[name])


def _launch(plan, kernel):
    return next(item for item in plan["launches"] if item["kernel"] == kernel)


def _set(kernel, table, **values):
    return lambda plan: _launch(plan, kernel)[table].update(values)


def _shift(plan):
    operand = _launch(plan, "qconv2d")["operands"]["x"]
    operand[5] += 1 << 16


def _alive(plan):
    plan["buffers"][0][1:3] = [100, 101]


def _together(plan):
    for buffer in plan["buffers"]:
        buffer[3] = 0


def _small_constant(plan):
    vector = next(c for c in plan["constants"].values() if c[1] == "vector")
    vector[2]["length"] = 1


def _numbers(plan):
    """Consistent with the memory, and not what the kernel was compiled for."""
    _launch(plan, "qconv2d")["constants"]["ACT"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [(_set("qconv2d", "constants", H=4000, W=4000), "reaches byte|pixels|32-bit"), (_set("qconv2d", "scalars", pixels=1 << 20), "reaches byte|pixels"),
     (_set("qconv2d", "constants", O=4096), "reaches byte|channels"), (_set("qconv2d", "constants", KC=4096), "reaches byte|KC|32"),
     (_set("qconv2d", "constants", H="8"), "malformed"), (_set("qconv2d", "constants", OH=0), "expected 1 or more"),
     (_shift, "ends at byte"), (_alive, "alive from|alive together"), (_together, "alive together"), (_small_constant, "reaches byte|cannot be made"),
     (_numbers, "compiled for a launch with other numbers"), (lambda p: p.update(counters=1 << 50), "malformed"),
     (lambda p: p.update(arena=1 << 39), "memory is"), (lambda p: p.update(output=[1, 9]), "reaches byte|ends at byte"),
     (lambda p: p["launches"].pop(), "do not fit together"), (lambda p: p["inputs"][0].__setitem__(1, [1, 1, 2, 2]), "input|ends at byte")],
    ids=lambda v: getattr(v, "__name__", str(v)[:40]),
)  # fmt: skip
def test_plans(parts, refused, change, message):
    _changed_plan(parts, change)
    refused(parts, message)


def test_machine_code_is_checked_before_it_is_loaded(frozen, refused):
    parts = thawed(frozen)
    first, second = list(parts.cubins)[:2]
    parts.cubins[first] = parts.cubins[second]
    parts.changed |= {first, second}
    refused(parts, "takes parameters|compiled for")  # signed again: another kernel under this one's name

    parts = thawed(frozen)
    image = bytearray(parts.cubins[first])
    image[48] = 90  # e_flags: sm_90
    parts.cubins[first] = bytes(image)
    parts.changed.add(first)
    refused(parts, "machine code for sm_90")

    parts = thawed(frozen)
    parts.manifest["device"]["cubins"][first.removeprefix("device.cubins.")].pop("sha256")
    refused(parts, "checksum")

    parts = thawed(frozen)
    record = parts.manifest["device"]["cubins"][first.removeprefix("device.cubins.")]
    record["params"] = [*record["params"], "u64"]
    refused(parts, "takes parameters")

    parts = thawed(frozen)
    parts.manifest["device"]["cubins"][first.removeprefix("device.cubins.")]["num_warps"] = 64
    refused(parts, "threads")


def test_inflation_is_bounded(parts, refused):
    name = _first_plan(parts)
    parts.plans.pop(name)
    parts.cubins[name] = bytes(4 << 20)  # deflates to four kilobytes
    parts.changed.add(name)
    refused(parts, "more than", Limits(inflated=1 << 20))
