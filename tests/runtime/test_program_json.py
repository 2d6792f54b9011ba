import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import LayerInfo, get_constant, layers
from edadm_compile.runtime.program_json import (
    MAX_DEPTH,
    _decode,
    _encode,
    graph_from_json,
    graph_to_json,
    layers_from_json,
)
from tests.graphs import GraphBuilder, assert_same_function, inputs_for


def _reload(program, dialect=None):
    records = json.loads(json.dumps(graph_to_json(program.graph_module.graph, [i.name for i in layers(program)])))
    module = graph_from_json(
        records, lambda name: get_constant(program.graph_module, name), dialect or program.dialect, layers(program)
    )
    return records, module


def test_a_graph_survives_json(compiled):
    for program in (compiled.qdq, compiled.lowered):
        records, module = _reload(program)
        assert graph_to_json(module.graph, [i.name for i in layers(program)]) == records
        inputs = program.graph_inputs(inputs_for(program))
        with torch.no_grad():
            assert torch.equal(module(*inputs), program.graph_module(*inputs))
        assert [n.meta.get("layer") for n in module.graph.nodes] == [
            n.meta.get("layer") for n in program.graph_module.graph.nodes
        ]


def test_every_kind_of_argument_survives():
    build = GraphBuilder(x=(4, 6, 6))
    y = build.op("aten.clamp.default", build.x, -math.inf, 0.75)
    y = build.op("aten._to_copy.default", y, dtype=torch.float64)
    y = build.op(
        "aten._to_copy.default",
        y,
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
        device=torch.device("cpu"),
    )
    y = build.op("aten.index.Tensor", y, [None, None, build.constant("rows", torch.tensor([1, 0, 3]))])
    y = build.op("aten.gelu.default", y, approximate="tanh")
    y = build.op("aten.mean.dim", y, [2], True)
    first = build.op("aten.split.Tensor", y, 2, 1)
    import operator

    y = build.graph.call_function(operator.getitem, (first, 1))
    program = build.program(y)
    records, module = _reload(program)
    assert {"float": "-inf"} in records[2][2] and "device" not in json.dumps(records)
    other = type(program)(module, "float", program.signature, program.sampler)
    assert_same_function(program, other, depth=0)


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=20),
    st.sampled_from([torch.float32, torch.int8, torch.bool]),
)  # fmt: skip
_PLAIN = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.builds(slice, st.integers(0, 9), st.integers(0, 9), st.none()),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(value=_PLAIN)
def test_plain_values_survive(value):
    text = json.dumps(_encode(value, {}), allow_nan=False)
    found = _decode(json.loads(text), [], 0)
    assert found == value and type(found) is type(value)


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ArtifactError, match="cannot store"):
        _encode(object(), {})
    with pytest.raises(ArtifactError, match="cannot store"):
        _encode(torch.ones(1), {})


_ADD = ["f", "aten.add.Tensor", ["%0", "%0"]]
_BAD = {
    "no list": {},
    "empty": [],
    "one node": [["o", "output", [1]]],
    "node that is no list": [["p", "x", []], 3],
    "node that is a table": [["p", "x", []], {}],
    "short node": [["p", "x", []], ["o"]],
    "unknown kind": [["p", "x", []], ["m", "x", []], ["o", "output", ["%0"]]],
    "unknown operator": [["p", "x", []], ["f", "os.system", ["ls"]], ["o", "output", ["%1"]]],
    "operator of another dialect": [["p", "x", []], ["f", "edadm.qlinear.default", ["%0"]], ["o", "output", ["%1"]]],
    "absent operator": [["p", "x", []], ["f", "aten.softsign.default", ["%0"]], ["o", "output", ["%1"]]],
    "target no text": [["p", "x", []], ["f", 3, ["%0"]], ["o", "output", ["%1"]]],
    "long target": [["p", "x", []], ["f", "a" * 9999, ["%0"]], ["o", "output", ["%1"]]],
    "input name is code": [["p", "x); import os; (", []], ["o", "output", ["%0"]]],
    "constant name is code": [["a", "a.b;c", []], ["o", "output", ["%0"]]],
    "unknown constant": [["a", "nothing", []], ["o", "output", ["%0"]]],
    "reads ahead": [["p", "x", []], ["f", "aten.neg.default", ["%5"]], ["o", "output", ["%1"]]],
    "reads itself": [["p", "x", []], ["f", "aten.neg.default", ["%1"]], ["o", "output", ["%1"]]],
    "negative reference": [["p", "x", []], ["f", "aten.neg.default", ["%-1"]], ["o", "output", ["%1"]]],
    "reference no number": [["p", "x", []], ["f", "aten.neg.default", ["%a"]], ["o", "output", ["%1"]]],
    "output missing": [["p", "x", []], _ADD],
    "output in the middle": [["p", "x", []], ["o", "output", ["%0"]], _ADD],
    "two outputs": [["p", "x", []], ["o", "output", ["%0"]], ["o", "output", ["%0"]]],
    "output of nothing": [["p", "x", []], ["o", "output", []]],
    "unknown object": [["p", "x", []], ["f", "aten.neg.default", [{"python": "1"}]], ["o", "output", ["%1"]]],
    "object with two keys": [["p", "x", []], ["f", "aten.neg.default", [{"str": "a", "dtype": "int8"}]], ["o", "output", ["%1"]]],
    "unknown dtype": [["p", "x", []], ["f", "aten.neg.default", [{"dtype": "float32.__class__"}]], ["o", "output", ["%1"]]],
    "dtype no text": [["p", "x", []], ["f", "aten.neg.default", [{"dtype": ["float32"]}]], ["o", "output", ["%1"]]],
    "bad float": [["p", "x", []], ["f", "aten.neg.default", [{"float": "1e3"}]], ["o", "output", ["%1"]]],
    "bad slice": [["p", "x", []], ["f", "aten.neg.default", [{"slice": [1]}]], ["o", "output", ["%1"]]],
    "long text": [["p", "x", []], ["f", "aten.neg.default", ["a" * 5000]], ["o", "output", ["%1"]]],
    "arguments no list": [["p", "x", []], ["f", "aten.neg.default", 3], ["o", "output", ["%1"]]],
    "keywords no table": [["p", "x", []], [*_ADD, 3], ["o", "output", ["%1"]]],
    "keyword no name": [["p", "x", []], [*_ADD, {"a b": 1}], ["o", "output", ["%1"]]],
    "keyword is reserved": [["p", "x", []], [*_ADD, {"lambda": 1}], ["o", "output", ["%1"]]],
    "input is reserved": [["p", "lambda", []], _ADD, ["o", "output", ["%1"]]],
    "input called self": [["p", "self", []], ["p", "self", []], _ADD, ["o", "output", ["%2"]]],
    "constant in a class": [["a", "__class__.weight", []], ["o", "output", ["%0"]]],
    "layer record missing": [["p", "x", []], [*_ADD, {}, 0], ["o", "output", ["%1"]]],
    "layer record negative": [["p", "x", []], [*_ADD, {}, -1], ["o", "output", ["%1"]]],
    "layer record no number": [["p", "x", []], [*_ADD, {}, "a"], ["o", "output", ["%1"]]],
}  # fmt: skip


def _no_tensors(name):
    raise KeyError(name)


@pytest.mark.parametrize("place", ["keyword", "input", "constant", "text"])
def test_names_never_become_code(place, tmp_path):
    """fx generates Python source from a graph: a name that is an expression must not get there."""
    flag = tmp_path / "executed"
    code = f"alpha=__import__('pathlib').Path({str(flag)!r}).touch() or 1, beta"
    records = [["p", "x", []], [*_ADD, {}], ["o", "output", ["%1"]]]
    if place == "keyword":
        records[1][3] = {code: 1}
    elif place == "input":
        records[0][1] = f"x=__import__('pathlib').Path({str(flag)!r}).touch()"
    elif place == "constant":
        records.insert(0, ["a", f"a.{code}", []])
    else:  # text is quoted: harmless
        records[1] = [
            "f",
            "aten.gelu.default",
            ["%0"],
            {"approximate": f"none') or __import__('pathlib').Path({str(flag)!r}).touch() or ('"},
        ]
    try:
        graph_from_json(records, lambda name: torch.ones(1), "float")(torch.ones(2))
        executed = True
    except ArtifactError:
        executed = False
    except RuntimeError as error:
        assert place == "text" and "approximate" in str(error)
        executed = False
    assert not executed and not flag.exists()


@pytest.mark.parametrize("name", list(_BAD))
def test_malformed_programs_are_refused(name):
    with pytest.raises(ArtifactError):
        graph_from_json(_BAD[name], _no_tensors, "float")


def test_deep_nesting_is_refused():
    value = [1]
    for _ in range(MAX_DEPTH + 1):
        value = [value]
    with pytest.raises(ArtifactError, match="nested"):
        _decode(value, [], 0)


@pytest.mark.parametrize("records", [None, {}, [1], [{}], [{"name": "a"}]], ids=str)
def test_malformed_layer_records_are_refused(records):
    with pytest.raises(ArtifactError, match="layer"):
        layers_from_json(records)


# what layer records say of the outputs of convolutions

_RANGED = LayerInfo(
    "a", "conv2d", (3, 2, 1, 1), "inner", 4, 8, "w4a8", out_scale=(0.5, 1e-12, 3.25), out_zero_point=(-128, 0, 127)
)


def _stored(info=_RANGED, **changes):
    return json.loads(json.dumps([{**dataclasses.asdict(info), **changes}]))


@pytest.mark.parametrize(
    "info",
    [
        _RANGED,
        dataclasses.replace(_RANGED, out_scale=None, out_zero_point=None, float_output=True),
        dataclasses.replace(_RANGED, kind="conv_transpose2d", weight_shape=(2, 3, 1, 1)),
        dataclasses.replace(_RANGED, kind="linear", weight_shape=(4, 4), out_scale=None, out_zero_point=None),
        LayerInfo("product", "matmul", (), "inner", 8, 8),
    ],
    ids=["range", "float output", "transposed", "linear", "product"],
)
def test_layer_records_survive(info):
    (found,) = layers_from_json(_stored(info))
    assert found == info
    assert [type(v) for v in dataclasses.astuple(found)] == [type(v) for v in dataclasses.astuple(info)]


@pytest.mark.parametrize("absent", [["out_scale", "out_zero_point"], ["float_output"], ["out_scale", "out_zero_point", "float_output"]], ids=str)  # fmt: skip
def test_records_of_earlier_versions_are_read(absent):
    info = dataclasses.replace(_RANGED, out_scale=None, out_zero_point=None)
    (record,) = _stored(info)
    (found,) = layers_from_json([{k: v for k, v in record.items() if k not in absent}])
    assert found == info


@pytest.mark.parametrize("absent", ["name", "kind", "weight_shape", "role", "weight_bits", "act_bits", "executed", "note"])  # fmt: skip
def test_older_fields_are_not_optional(absent):
    (record,) = _stored()
    with pytest.raises(ArtifactError, match="layer"):
        layers_from_json([{k: v for k, v in record.items() if k != absent}])


_SCALES, _ZEROS = [0.5, 0.25, 3.25], [-128, 0, 127]


@pytest.mark.parametrize(
    "changes",
    [
        {"out_scale": None}, {"out_zero_point": None},
        {"out_scale": _SCALES[:2]}, {"out_zero_point": _ZEROS[:2]}, {"out_scale": [], "out_zero_point": []},
        {"out_scale": _SCALES[:2], "out_zero_point": _ZEROS[:2]},  # as many as input channels
        {"out_scale": [*_SCALES, 1.0], "out_zero_point": [*_ZEROS, 0]},
        {"kind": "conv_transpose2d"},  # its output channels come second
        {"out_scale": [0.5, 0.0, 1.0]}, {"out_scale": [0.5, -0.25, 1.0]}, {"out_scale": [0.5, -0.0, 1.0]},
        {"out_scale": [0.5, math.nan, 1.0]}, {"out_scale": [0.5, math.inf, 1.0]}, {"out_scale": [0.5, 1, 1.0]},
        {"out_scale": [0.5, "1.0", 1.0]}, {"out_scale": [0.5, None, 1.0]}, {"out_scale": [0.5, True, 1.0]},
        {"out_scale": 0.5}, {"out_scale": "abc"}, {"out_scale": {"0": 1.0, "1": 1.0, "2": 1.0}},
        {"out_zero_point": [-129, 0, 0]}, {"out_zero_point": [0, 128, 0]}, {"out_zero_point": [0, 0, 0.0]},
        {"out_zero_point": [0, False, 0]}, {"out_zero_point": [0, None, 0]}, {"out_zero_point": "000"},
        {"out_zero_point": 0}, {"out_zero_point": {"0": 0, "1": 0, "2": 0}},
        {"float_output": 1}, {"float_output": 0}, {"float_output": None}, {"float_output": "true"},
        {"float_output": []}, {"out_shift": 1},
    ],
    ids=str,
)  # fmt: skip
def test_unsound_output_ranges_are_refused(changes):
    with pytest.raises(ArtifactError, match="malformed layer record"):
        layers_from_json(_stored(**changes))


def test_one_key_of_the_range_alone_is_refused():
    (record,) = _stored()
    for key in ("out_scale", "out_zero_point"):
        with pytest.raises(ArtifactError, match="malformed layer record"):
            layers_from_json([{k: v for k, v in record.items() if k != key}])


def test_one_unsound_record_among_others_is_refused():
    records = [*_stored(), *_stored(name="b", out_zero_point=[0, 0, 128]), *_stored(name="c")]
    with pytest.raises(ArtifactError, match="malformed layer record"):
        layers_from_json(records)
    assert [info.name for info in layers_from_json([records[0], records[2]])] == ["a", "c"]
