"""Widths by measured errors and integer programming, on tiny models."""

import math
from dataclasses import replace

import pytest
import torch

from edadm_compile.config import LayerRule
from edadm_compile.errors import CalibrationError, ConfigError
from edadm_compile.ir.analysis import layer_weight
from edadm_compile.ir.program import layer_of, layers, set_constant
from edadm_compile.passes import layer_errors as measuring
from edadm_compile.passes import mixed_widths
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context
from edadm_compile.passes.calibrate import ActivationObserver, activation_quantizers, weight_quantizers
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.layer_roles import annotate
from edadm_compile.passes.sensitivity import measurement_inputs, measurement_weights
from edadm_compile.pipeline import compile_source
from edadm_compile.quant.affine import per_channel, weight_codes
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import weight_spec
from tests.graphs import Planted, TinyUNet, apply, collected, float_program, random_calibration, small_config, source_of


@pytest.fixture(scope="module")
def planted_source():
    return source_of(Planted())


@pytest.fixture(scope="module")
def planted(planted_source):
    program = float_program(planted_source)
    return program, collected(program, small_config())


def assigned(model, **changes):
    program, calibration = model
    after, ctx = apply(program, AssignWidths(), config=small_config(**changes), calibration=calibration)
    return {i.name: i for i in layers(after) if i.weight_shape}, ctx.stats["assign_widths"]["mixed"]


def stored(infos):
    sizes = {n: math.prod(i.weight_shape) for n, i in infos.items() if i.weight_bits < 32}
    return sum(s * (4 if infos[n].weight_bits <= 4 else 8) for n, s in sizes.items()) / sum(sizes.values())


# the choice


def test_the_planted_layer_gets_the_bits_that_one_layer_can_have(planted_source):
    """End to end: the budget has room for one of four equal layers."""
    sizes = 2 * 216 + 4 * 576
    result = compile_source(planted_source, small_config(budget_bits=4 + 4 * (2 * 216 + 576) / sizes))
    report = result.stats["assign_widths"]["mixed"]
    assert {r["layer"]: r["widths"] for r in report["layers"]} == {
        "stem": "w8a16", "first": "w4a8", "second": "w4a8", "wild": "w8a8", "third": "w4a8", "head": "w8a8",
    }  # fmt: skip
    executed = {i.name: i.executed for i in layers(result.lowered)}
    assert executed["wild"] == "w8a8" and executed["first"] == executed["third"] == "w4a8"
    assert report["measured"]
    # Other trajectories, and errors that do not just add up: four seeds differ by at most 1.6 dB, this one by 0.3 dB.
    assert abs(result.quality.sqnr - report["predicted_sqnr"]) < 1


def test_a_layer_takes_no_more_than_the_budget_and_the_report_says_what_it_takes(labelled):
    for budget in (4.4, 5, 6.3, 8):
        infos, report = assigned(labelled, budget_bits=budget)
        assert report["stored_bits"] == pytest.approx(stored(infos)) and stored(infos) <= budget
        assert {r["layer"]: r["widths"] for r in report["layers"] if r["parameters"]} == {
            n: f"w{i.weight_bits}a{i.act_bits}" for n, i in infos.items()
        }
        total = sum(r["errors"][r["widths"]] for r in report["layers"])
        assert report["predicted_sqnr"] == pytest.approx(-10 * math.log10(total))
    assert {i.weight_bits for i in infos.values()} == {8}


def test_more_bits_are_never_predicted_worse(labelled):
    found = [assigned(labelled, budget_bits=b)[1]["predicted_sqnr"] for b in (4.3, 4.6, 5, 6, 7, 8)]
    assert found == sorted(found) and found[0] < found[-1] - 3
    curve = assigned(labelled, budget_bits=5)[1]["curve"]
    assert len(curve) == 9 and [p["bits"] for p in curve] == sorted(p["bits"] for p in curve)
    assert [p["predicted_sqnr"] for p in curve] == sorted(p["predicted_sqnr"] for p in curve)
    assert curve[-1]["predicted_sqnr"] == pytest.approx(found[-1])


def test_a_wanted_sqnr_is_predicted_with_no_more_bits_than_needed(planted):
    curve = assigned(planted, budget_bits=8)[1]["curve"]
    wanted = (curve[0]["predicted_sqnr"] + curve[-1]["predicted_sqnr"]) / 2
    infos, report = assigned(planted, min_sqnr=wanted)
    assert report["predicted_sqnr"] >= wanted and report["stored_bits"] == pytest.approx(stored(infos))
    less = report["stored_bits"] - 4 / sum(math.prod(i.weight_shape) for i in infos.values())
    assert assigned(planted, budget_bits=less)[1]["predicted_sqnr"] < wanted


def test_narrow_widths_are_the_requested_ones(labelled):
    infos, report = assigned(labelled, weight_bits=3, act_bits=6, budget_bits=5)
    inner = {(i.weight_bits, i.act_bits) for i in infos.values() if i.role in ("inner", "conditioning")}
    assert inner == {(3, 6), (8, 8)}
    assert report["stored_bits"] == pytest.approx(stored(infos)) and report["stored_bits"] <= 5


# rules


def test_rules_are_fixed_in_the_program(labelled):
    rules = (
        LayerRule("block1.conv1", weight_bits=8),
        LayerRule("block3.*", weight_bits=32),
        LayerRule("attention.*", weight_bits=4),
        LayerRule("head", weight_bits=4),
    )
    infos, report = assigned(labelled, budget_bits=5, rules=rules)
    rows = {r["layer"]: r for r in report["layers"]}
    assert infos["block1.conv1"].weight_bits == 8 and rows["block1.conv1"]["fixed"]
    assert infos["block3.conv1"].weight_bits == 32 and not any(n.startswith("block3.") for n in rows)
    assert {infos[f"attention.{n}"].weight_bits for n in ("q", "k", "v", "out")} == {4}
    assert rows["attention.q"]["fixed"] and rows["attention.q"]["widths"] == "w4a8"
    assert rows["head"]["widths"] == "w4a8" and infos["head"].weight_bits == 4
    assert stored(infos) == pytest.approx(report["stored_bits"]) and stored(infos) <= 5


def test_quantized_products_count_in_the_prediction(labelled, labelled_source):
    program = float_program(labelled_source, small_config(attention="int8"))
    rows = assigned((program, labelled[1]), budget_bits=5, attention="int8")[1]["layers"]
    products = [r for r in rows if r["parameters"] == 0]
    assert len(products) == 2 and all(r["fixed"] and r["errors"]["w8a8"] > 0 for r in products)
    assert not [r for r in assigned(labelled, budget_bits=5)[1]["layers"] if r["parameters"] == 0]


# requests out of reach


def test_a_budget_out_of_reach_names_the_nearest_one(planted_source, planted, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"budget_bits: got 4.2, the smallest that this model reaches is 4.632: "
    ) as e:
        assigned(planted, budget_bits=4.2)
    assert assigned(planted, budget_bits=float(str(e.value).split("reaches is ")[1].split(":")[0]))
    monkeypatch.setattr("edadm_compile.pipeline.collect", lambda *a, **k: pytest.fail("calibrated first"))
    with pytest.raises(ConfigError, match="smallest that this model reaches"):
        compile_source(planted_source, small_config(budget_bits=4.2))


def test_an_sqnr_out_of_reach_names_the_nearest_one(planted):
    with pytest.raises(ConfigError, match=r"min_sqnr: got 110.0 dB, the highest .* is [\d.]+ dB, at 8.00 stored") as e:
        assigned(planted, min_sqnr=110.0)
    nearest = float(str(e.value).split("reach is ")[1].split(" dB")[0])
    assert assigned(planted, min_sqnr=nearest)[1]["stored_bits"] == 8
    with pytest.raises(ConfigError, match="min_sqnr: got"):
        assigned(planted, min_sqnr=nearest + 0.02)


def test_a_model_without_integer_layers_has_nothing_to_choose(planted):
    with pytest.raises(ConfigError, match="nothing to choose"):
        assigned(planted, budget_bits=5, rules=(LayerRule("*", weight_bits=32),))


def test_a_broken_model_is_no_basis_for_a_choice(planted):
    program, calibration = planted
    broken = program.fork()
    set_constant(broken.graph_module, "head.weight", torch.full((3, 8, 3, 3), float("inf")))
    with pytest.raises(CalibrationError, match="not finite"):
        assigned((broken, calibration), budget_bits=6)


# large models


def test_above_the_limit_weight_errors_decide_and_no_sqnr_is_predicted(planted, monkeypatch):
    monkeypatch.setattr(mixed_widths, "MEASURE_LIMIT", 1000)
    monkeypatch.setattr(measuring, "values_of", lambda *a: pytest.fail("ran the model"))
    budget = 4 + 4 * (2 * 216 + 576) / (2 * 216 + 4 * 576)
    infos, report = assigned(planted, budget_bits=budget)
    assert not report["measured"] and report["predicted_sqnr"] is None
    assert infos["wild"].weight_bits == 8 and stored(infos) <= budget
    with pytest.raises(
        ConfigError, match=r"min_sqnr = 30.0 needs a measured sensitivity.* 1,000 parameters.*budget_bits"
    ):
        assigned(planted, min_sqnr=30.0)


def test_weight_errors_count_by_resolution(labelled_program):
    config = small_config(budget_bits=5)
    program = labelled_program.fork()
    annotate(program, config)
    options = mixed_widths.options_of(program, config)
    found = {
        o.name: e for o, e in zip(options, measuring.weight_errors(program, options, Context(config)), strict=True)
    }
    for name, share in (("block1.conv1", 1), ("block2.conv1", 1 / 4), ("attention.q", 1 / 4), ("block1.emb", 1)):
        node = next(n for n in program.graph_module.graph.nodes if (i := layer_of(n)) and i.name == name)
        weight = layer_weight(program, node)
        rounded = _rounded(weight, 4)
        expected = float((rounded - weight).square().sum() / weight.square().sum()) * share
        assert found[name][0] == pytest.approx(expected, rel=1e-4)


def _rounded(weight, bits):
    scale = search_weight(weight, weight_spec(bits), candidates=40)
    return weight_codes(weight, scale, weight_spec(bits)).float() * per_channel(scale, weight.dim(), 0)


# the measurement


@pytest.fixture
def fixed_ranges(monkeypatch):
    """Ranges that do not depend on a random subsample."""
    monkeypatch.setattr(ActivationObserver, "affine", lambda *a, **k: (torch.tensor([0.05]), torch.tensor([3.0])))


def _measured(program, calibration, config):
    program = program.fork()
    annotate(program, config)
    options = mixed_widths.options_of(program, config)
    errors, signal = measuring.layer_errors(program, options, Context(config, calibration=calibration))
    return program, dict(zip((o.name for o in options), errors, strict=True)), signal


@pytest.mark.parametrize("name", ["block2.conv1", "merge.part0", "attention.q", "label_proj"])
def test_the_error_is_that_of_quantizing_the_layer_alone(labelled, fixed_ranges, name):
    """Recomputed with the quantizers of the compiler in a program where this layer alone has them."""
    program, calibration = labelled
    config = small_config(budget_bits=5)
    annotated, errors, signal = _measured(program, calibration, config)
    inputs = measurement_inputs(calibration.trajectories, annotated.signature)
    weights = measurement_weights(calibration.trajectories, annotated.signature)
    with torch.no_grad():
        exact = annotated(*inputs).double()
    assert signal == pytest.approx(float((exact.square().flatten(1).sum(1) * weights).sum()), rel=1e-6)
    for option, bits in enumerate((4, 8)):
        alone = program.fork()
        annotate(alone, config)
        for node in alone.graph_module.graph.nodes:
            info = layer_of(node)
            if info is not None and info.weight_bits < 32:
                keep = info.name == name
                node.meta["layer"] = replace(info, weight_bits=bits if keep else 32, act_bits=8 if keep else 32)
        alone = apply(alone, InsertQuant(), config=config)[0]
        for _, quantizer in activation_quantizers(alone):
            quantizer.set_affine(torch.tensor([0.05]), torch.tensor([3.0]))
        for node, quantizer in weight_quantizers(alone):
            layer = next(iter(node.users))
            quantizer.set_scale(search_weight(layer_weight(alone, layer), quantizer.spec, candidates=40))
        with torch.no_grad():
            difference = alone(*inputs).double() - exact
        expected = float((difference.square().flatten(1).sum(1) * weights).sum())
        assert expected > 0 and errors[name][option] == pytest.approx(expected, rel=1e-3)


def test_slices_change_memory_and_not_the_errors(labelled, fixed_ranges, monkeypatch):
    program, calibration = labelled
    config = small_config(budget_bits=5)
    whole = _measured(program, calibration, config)
    monkeypatch.setattr(measuring, "_MOST_BYTES", 1)
    seen = []
    original = measuring.values_of
    monkeypatch.setattr(measuring, "values_of", lambda p, x: seen.append(x[0].shape[0]) or original(p, x))
    sliced = _measured(program, calibration, config)
    assert set(seen) == {1} and len(seen) > 10
    assert sliced[2] == pytest.approx(whole[2], rel=1e-5)
    for name, errors in whole[1].items():
        assert sliced[1][name] == pytest.approx(errors, rel=1e-3), name


def test_weights_of_the_states_stand_for_all_sampler_steps(labelled):
    """A function that is linear between the measured steps has the same weighted sum as over all steps."""
    program, _ = labelled
    calibration = random_calibration(program)
    trajectories = calibration.trajectories
    steps = 50
    long = type(trajectories)(
        torch.zeros(steps, 6, *trajectories.x.shape[2:]), torch.zeros(steps, 6, *trajectories.x.shape[2:]),
        torch.arange(steps), tuple(c[:1].repeat(6, *[1] * (c.dim() - 1)) for c in trajectories.conditions),
    )  # fmt: skip
    weights = measurement_weights(long, program.signature)
    at = measurement_inputs(long, program.signature)[1].double()
    assert float(weights.sum()) == pytest.approx(6 * steps)
    assert float((weights * (3 * at + 1)).sum()) == pytest.approx(6 * sum(3 * k + 1 for k in range(steps)))
    assert float(weights[at == steps - 1][0]) < 1.5 < float(weights[at == 0][0])


def test_a_fixed_batch_is_measured_whole():
    source = source_of(TinyUNet())
    program = float_program(source)
    fixed = replace(program, signature=replace(program.signature, min_batch=2, max_batch=2))
    calibration = collected(program, small_config())
    _, errors, signal = _measured(fixed, calibration, small_config(budget_bits=5))
    assert signal > 0 and all(e[-1] >= 0 for e in errors.values())
