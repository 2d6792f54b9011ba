import pytest
import torch

from edadm_compile.evaluate.compare import compare_images, compare_noise
from edadm_compile.evaluate.contract import check_layers, check_weights
from edadm_compile.ir.analysis import is_layer, layer_weight
from edadm_compile.ir.program import get_constant, layer_of, set_constant
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.quant import packing
from tests.graphs import inputs_for


@pytest.fixture(scope="module")
def inputs(compiled):
    return inputs_for(compiled.lowered, batch=4)


def _failures(compiled, lowered, inputs):
    return {r.layer: r.failure for r in check_layers(compiled.qdq, lowered, inputs) if r.failure}


def _broken(compiled, name, change):
    """The lowered program with one constant changed."""
    fork = compiled.lowered.fork()
    set_constant(fork.graph_module, name, change(get_constant(fork.graph_module, name).clone()))
    return fork


def test_a_good_program_passes(compiled, inputs):
    reports = check_layers(compiled.qdq, compiled.lowered, inputs)
    names = {
        layer_of(n).name
        for n in compiled.lowered.graph_module.graph.nodes
        if layer_of(n) and layer_of(n).executed != "float"
    }
    assert {r.layer for r in reports} == names and len(reports) > 15
    assert all(
        not r.failure and r.accumulators_equal and r.accumulators > 0 and 0 <= r.error_over_bound <= 1 for r in reports
    )
    # The bound is tight enough to mean something: some layer comes near it.
    assert max(r.error_over_bound for r in reports) > 0.1


def _scaled(value, index, factor):
    value[index] *= factor
    return value


def _swapped(value):
    value[[0, 1]] = value[[1, 0]]
    return value


def _nudged(value):
    value.view(torch.uint8).view(-1)[3] ^= 1
    return value


_DAMAGE = {
    "doubled multiplier": ("multiplier", lambda v: v * 2),
    "one multiplier off by a millionth": ("multiplier", lambda v: _scaled(v, 2, 1 + 3e-6)),
    "zeroed multiplier row": ("multiplier", lambda v: _scaled(v, 1, 0.0)),
    "swapped multipliers": ("multiplier", _swapped),
    "swapped biases": ("bias_q", _swapped),
    "shifted bias": ("bias_q", lambda v: v + 1e-3),
    "zeroed weight row": ("weight_q", lambda v: _scaled(v, 0, 0)),
    "swapped channels": ("weight_q", _swapped),
    "one changed code": ("weight_q", _nudged),
    "not a number": ("multiplier", lambda v: _scaled(v, 0, float("nan"))),
}


@pytest.mark.parametrize("layer", ["stem", "block2.conv1", "attention.q", "up", "merge.part1"])
@pytest.mark.parametrize("damage", list(_DAMAGE))
def test_damage_is_found_and_placed(compiled, inputs, layer, damage):
    leaf, change = _DAMAGE[damage]
    failures = _failures(compiled, _broken(compiled, f"{layer}.{leaf}", change), inputs)
    assert list(failures) == [layer]
    assert ("accumulators" in failures[layer]) == (leaf == "weight_q")


def _node(program, name):
    return next(n for n in program.graph_module.graph.nodes if layer_of(n) and layer_of(n).name == name)


def test_a_wrong_padding_code_is_found(compiled, inputs):
    fork = compiled.lowered.fork()
    node = _node(fork, "block1.conv1")
    node.args = (*node.args[:4], node.args[4] + 1, *node.args[5:])
    assert "accumulators" in _failures(compiled, fork, inputs)["block1.conv1"]


def test_a_wrong_zero_point_or_scale_of_a_product_is_found(compiled, inputs):
    fork = compiled.lowered.fork()
    node = next(n for n in fork.graph_module.graph.nodes if str(n.target) == "edadm.qmatmul.default")
    scale = str(node.args[2].target)
    set_constant(fork.graph_module, scale, get_constant(fork.graph_module, scale) * (1 + 1e-5))
    assert list(_failures(compiled, fork, inputs)) == [layer_of(node).name]
    fork = compiled.lowered.fork()
    node = next(n for n in fork.graph_module.graph.nodes if str(n.target) == "edadm.qmatmul.default")
    node.args = (*node.args[:3], node.args[3] + 1, node.args[4])
    assert "accumulators" in _failures(compiled, fork, inputs)[layer_of(node).name]


def test_a_missing_twin_is_found(compiled, inputs):
    fork = compiled.lowered.fork()
    del _node(fork, "head").meta["layer"]
    assert "no integer twin" in _failures(compiled, fork, inputs)["head"]


@pytest.fixture(scope="module")
def weights(labelled_program):
    found = {}
    for node in labelled_program.graph_module.graph.nodes:
        if is_layer(node):
            axis = 1 if "transpose" in str(node.target) else 0
            found[layer_name(node)] = (layer_weight(labelled_program, node).transpose(0, axis), axis)
    return found


def test_codes_belong_to_the_reference(compiled, weights):
    report = check_weights(compiled.qdq, weights)
    assert report["failures"] == {} and report["checked"] > 15


@pytest.mark.parametrize("layer", ["stem", "block2.conv1", "up", "attention.v"])
def test_a_changed_code_is_found(compiled, weights, layer):
    fork = compiled.qdq.fork()
    info = layer_of(_node(fork, layer))
    shape = next(
        n.args[3]
        for n in fork.graph_module.graph.nodes
        if n.args and getattr(n.args[0], "target", "") == f"{layer}.weight_q"
    )
    codes = packing.unpack(get_constant(fork.graph_module, f"{layer}.weight_q"), info.weight_bits, shape).clone()
    flat = codes.view(-1)
    flat[5] = flat[5] - 2 if int(flat[5]) > 0 else flat[5] + 2
    set_constant(fork.graph_module, f"{layer}.weight_q", packing.pack(codes, info.weight_bits))
    report = check_weights(fork, weights)
    assert list(report["failures"]) == [layer] and "1 of" in report["failures"][layer]
    assert report["checked"] == check_weights(compiled.qdq, weights)["checked"] - 1


def test_another_model_is_found(compiled, weights):
    other = {name: (w + 0.5 * w.abs().max(), axis) for name, (w, axis) in weights.items()}
    assert len(check_weights(compiled.qdq, other)["failures"]) > 15
    fewer = {name: w for name, w in weights.items() if name != "stem"}
    assert check_weights(compiled.qdq, fewer)["failures"] == {"stem": "the reference has no such layer"}
    wrong = {**weights, "stem": (weights["stem"][0][:, :1], 0)}
    assert "shape" in check_weights(compiled.qdq, wrong)["failures"]["stem"]


def test_noise_is_compared_along_the_references_own_trajectory(compiled):
    program = compiled.lowered
    x, _, label = inputs_for(program, batch=3)
    same = compare_noise(program, program, program.sampler, x, [label])
    assert same.sqnr == float("inf") and len(same.per_step) == 4
    seen = []

    def half(x, t, c):
        seen.append(x)
        return 0.9 * program(x, t, c)

    found = compare_noise(program, half, program.sampler, x, [label])
    assert found.sqnr == pytest.approx(20.0, abs=1e-3) and found.worst == pytest.approx(20.0, abs=1e-3)
    assert found.sqnr_without_last == pytest.approx(20.0, abs=1e-3) and torch.equal(seen[0], x)


def test_images_are_compared_from_the_same_noise(compiled):
    program = compiled.lowered
    x, _, label = inputs_for(program, batch=2)
    a, b, value = compare_images(program, program, program.sampler, x, [label])
    assert torch.equal(a, b) and value.shape == (2,) and float(value.min()) > 100
