"""Launch plans in files: they come back as they were, and a forged one is refused before anything runs."""

import json

import pytest

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels import plan_json
from tests.graphs import TinyUNet
from tests.lowering.plans import inputs_of, lowered, plan_of, run


@pytest.fixture(scope="module")
def program():
    return lowered(TinyUNet(classes=3), attention="int8", options={"num_classes": {"label": 3}})


@pytest.fixture(scope="module")
def plan(program):
    return plan_of(program)


def test_round_trip(program, plan):
    text = plan_json.to_json(plan)
    again = plan_json.from_json(text)
    assert plan_json.to_json(again) == text
    inputs = inputs_of(program, 2)
    assert (run(program, again, inputs) == run(program, plan, inputs)).all()


def forged(plan, change):
    value = json.loads(plan_json.to_json(plan))
    change(value)
    return json.dumps(value)


def _launch(value, kernel):
    return next(item for item in value["launches"] if item["kernel"] == kernel)


def _past_the_end(value):
    operand = _launch(value, "qconv2d")["operands"]["x"]
    operand[3] = [operand[3][0] * 1000, *operand[3][1:]]


def _outside_the_arena(value):
    value["buffers"][0][3] = value["arena"]


def _foreign_operator(value):
    _launch(value, "torch")["call"][0] = "aten.resize_.default"


def _negative_stride(value):
    _launch(value, "qconv2d")["operands"]["x"][4][0] = -1


FORGERIES = {
    "a view past the end of its buffer": (_past_the_end, "ends at byte"),
    "a buffer outside the arena": (_outside_the_arena, "outside the arena"),
    "an operator that is not in the table": (_foreign_operator, "unknown operator"),
    "a negative stride": (_negative_stride, "malformed"),
    "an unknown kernel": (lambda v: v["launches"][0].update(kernel="rm"), "unknown kernel"),
    "an unknown transform": (lambda v: next(iter(v["constants"].values())).__setitem__(1, "exec"), "unknown transform"),
    "a constant that is no number": (lambda v: _launch(v, "qconv2d")["constants"].update(H="8"), "malformed"),
    "a missing constant": (lambda v: v["constants"].clear(), "no constant"),
    "a buffer that does not exist": (lambda v: v["buffers"].clear(), "no buffer"),
    "too many conditioning launches": (lambda v: v.update(conditioning=10_000), "conditioning"),
    "absurd sizes": (lambda v: v.update(arena=1 << 60), "malformed"),
    "no launches at all": (lambda v: v.pop("launches"), "malformed"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries_are_refused(plan, name):
    change, message = FORGERIES[name]
    with pytest.raises(ArtifactError, match=message):
        plan_json.from_json(forged(plan, change))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"arch": 1}', "[" * 5000])
def test_text_that_is_no_plan(text):
    with pytest.raises(ArtifactError, match="launch plan"):
        plan_json.from_json(text)
