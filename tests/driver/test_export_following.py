"""What is found, and what is allowed, where values between the layers of a graph are compared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from edadm_compile.driver.export_following import SHARE, Following
from edadm_compile.driver.export_probing import Probed, other_timestep
from edadm_compile.export.convert import OUTPUT, convert
from edadm_compile.export.targets import target
from tests.lowering.plans import inputs_of


@pytest.fixture(scope="module")
def inputs(artifact):
    return inputs_of(artifact.lowered, 12)


@pytest.fixture(scope="module", params=["cpu", "arm", "tensorrt"])
def graph(request, artifact, inputs, tmp_path_factory):
    """(exported, ONNX Runtime's values)"""
    exported = convert(artifact.qdq, target(request.param))
    return exported, Probed(exported, Path(tmp_path_factory.mktemp("probed"))).run(inputs)


def follow(graph, inputs, found=None, **options):
    """(Following, distance of the prediction)"""
    following = Following(graph[0], graph[1] if found is None else found, **options)
    return following, following.run(inputs)


def failures(following) -> dict[str, str]:
    return {n: d.failure for n, d in (following.inputs | following.outputs).items() if d.failure}


def inner(graph):
    """A layer in the middle with many input codes, that are made between layers, and their name."""
    written = {layer.result for layer in graph[0].layers}
    layers = [ly for ly in graph[0].layers if ly.info.kind == "conv2d" and ly.sources and ly.sources[0] not in written]
    layer = next(ly for ly in layers if len(ly.codes) == 1)
    return layer.info.name, str(layer.codes[0].name)


def test_right_values_are_as_near_as_rounding(graph, inputs):
    for layers_too in (False, True):
        following, prediction = follow(graph, inputs, layers_too=layers_too)
        assert failures(following) == {} and prediction.failure == ""
        assert len(following.inputs) > 5 and all(0.4 < d.error <= d.rounding for d in following.inputs.values())
        assert bool(following.outputs) == layers_too


@pytest.mark.parametrize(("places", "steps", "message"), [
    (1, 0, ""), (1, 1, ""), (1, 3, r"lie up to [23]\.\d steps from .*; 1\.5 are allowed"),
    (0.02, 1, r"\d\.\d% of its input codes are not the nearest to their values; 0\.1% are allowed"),
])  # fmt: skip
def test_a_flipped_code_is_allowed_and_many_or_far_ones_are_not(graph, inputs, places, steps, message):
    name, codes = inner(graph)
    wrong = graph[1][codes].copy()
    count = places if isinstance(places, int) else int(places * wrong.size)
    assert 1 / wrong.size < SHARE < 0.02
    # codes in the middle of the range, which a step does not take out of it
    middle = np.flatnonzero(abs(wrong.astype(int) - int(np.median(wrong))) < 40)[:count]
    wrong.reshape(-1)[middle] += np.array(steps, wrong.dtype)
    following, _ = follow(graph, inputs, {**graph[1], codes: wrong})
    found = failures(following)
    assert set(found) == ({name} if message else set())
    if message:
        assert re.search(message, found[name])


def test_a_wrong_end_is_seen(graph, inputs):
    following, prediction = follow(graph, inputs, {**graph[1], OUTPUT: graph[1][OUTPUT] * np.float32(1.0001)})
    assert failures(following) == {} and "the value behind the last layer differs by" in prediction.failure
    cut = {**graph[1], OUTPUT: graph[1][OUTPUT][:, :2]}
    assert "[12, 2, 8, 8], not [12, 3, 8, 8]" in follow(graph, inputs, cut)[1].failure


def test_values_are_let_go_when_they_have_been_read(graph, inputs):
    class Counting(Following):
        most = 0

        def _visit(self, node):
            super()._visit(node)
            tensors = [v for n, v in self._values.items() if isinstance(v, torch.Tensor) and n.op == "call_function"]
            self.most = max(self.most, len(tensors))

    following = Counting(*graph)
    following.run(inputs)
    total = sum(n.op == "call_function" for n in graph[0].prepared.graph_module.graph.nodes)
    assert 0 < following.most < total / 10


def test_the_other_timestep_is_one_without_a_row(artifact):
    t = other_timestep(artifact.lowered)
    assert t is not None and t == int(t) and 0 < t < max(artifact.lowered.time.keys)
    assert t not in artifact.lowered.time.keys.tolist()
