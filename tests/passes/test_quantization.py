"""insert_quant, calibrate, mean_correction, freeze and lower: one test per numbered rule, on small hand-written graphs."""

import dataclasses

import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.errors import CalibrationError
from edadm_compile.evaluate.contract import check_layers
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.program import LayerInfo, TimeTables, get_constant, layer_of
from edadm_compile.methods import METHODS
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import ActivationObserver, Calibrate, activation_quantizers, weight_quantizers
from edadm_compile.passes.freeze import Freeze
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.lower import Lower
from edadm_compile.passes.mean_correction import INPUT, MeanCorrection, merge_table
from edadm_compile.quant import packing
from edadm_compile.quant.fake_quant import ActFakeQuant
from edadm_compile.quant.observers import affine_from_range, minmax_weight, search_weight
from edadm_compile.quant.spec import act_spec, weight_spec
from tests.graphs import (
    GraphBuilder,
    apply,
    assert_close,
    assert_same_function,
    count_ops,
    inputs_for,
    nodes_of,
    random_calibration,
    small_config,
)


def _widths(node, weight, act):
    node.meta["layer"] = dataclasses.replace(node.meta["layer"], weight_bits=weight, act_bits=act)
    return node


def _two_layers(weight=4, act=8):
    build = GraphBuilder(seed=3)
    h = _widths(build.conv("a", build.x, 4, 6), 8, 16)
    h = build.op("aten.silu.default", h)
    return build.program(_widths(build.conv("b", h, 6, 4), weight, act))


def _calibrated(program, config=None):
    config = config or small_config()
    return apply(program, InsertQuant(), Calibrate(), config=config, calibration=random_calibration(program))


def _frozen(program, config=None):
    """(fake_quant, qdq, lowered, context)."""
    fake, ctx = _calibrated(program, config)
    qdq = run_passes(fake, [Freeze()], ctx)
    return fake, qdq, run_passes(qdq, [Lower()], ctx), ctx


# insert_quant


def test_insert_rule_1_every_layer_reads_quantized_operands():
    program = _two_layers()
    after, ctx = apply(program, InsertQuant())
    assert after.dialect == "fake_quant" and ctx.stats["insert_quant"]["activation_quantizers"] == 2
    acts, weights = [m for _, m in activation_quantizers(after)], [m for _, m in weight_quantizers(after)]
    assert [m.spec.bits for m in acts] == [16, 8] and [m.spec.bits for m in weights] == [8, 4]
    for node in nodes_of(after, "aten.conv2d.default"):
        assert node.args[0].op == node.args[1].op == "call_module"
    assert_same_function(program, after, depth=0)  # nothing happens before calibration


def test_insert_rule_1_readers_of_one_value_share_a_quantizer_per_width():
    build = GraphBuilder()
    convs = [_widths(build.conv(f"c{i}", build.x, 4, 4), 4, bits) for i, bits in enumerate((8, 8, 16))]
    out = build.op("aten.add.Tensor", build.op("aten.add.Tensor", convs[0], convs[1]), convs[2])
    after, ctx = apply(build.program(out), InsertQuant())
    assert ctx.stats["insert_quant"]["activation_quantizers"] == 2
    first, second, third = nodes_of(after, "aten.conv2d.default")
    assert first.args[0] is second.args[0] is not third.args[0]


def test_insert_rule_1_float_layers_are_left_alone():
    build = GraphBuilder()
    program = build.program(_widths(build.conv("a", build.x, 4, 4), 32, 32))
    after, _ = apply(program, InsertQuant())
    assert not list(activation_quantizers(after)) and not list(weight_quantizers(after))


def _product(build):
    y = build.op("aten.silu.default", build.x)
    out = build.op("aten.matmul.default", build.x, build.op("aten.transpose.int", y, -2, -1))
    out.meta["layer"] = LayerInfo("product", "matmul", (), "inner", 8, 8)
    return out


def test_insert_rule_2_both_operands_of_a_product():
    after, ctx = apply(_matmul_program(), InsertQuant())
    (node,) = nodes_of(after, "aten.matmul.default")
    assert [a.op for a in node.args] == ["call_module"] * 2 and ctx.stats["insert_quant"]["activation_quantizers"] == 2


# calibrate


def _hidden(program, x):
    """What the second layer of `_two_layers` reads."""
    weight, bias = (get_constant(program.graph_module, f"a.{n}") for n in ("weight", "bias"))
    return torch.nn.functional.silu(torch.nn.functional.conv2d(x, weight, bias, padding=1))


def test_calibrate_rule_1_ranges_are_those_of_the_calibration_set():
    program = _two_layers()
    config = small_config(method="minmax")
    calibration = random_calibration(program)
    fake, ctx = apply(program, InsertQuant(), Calibrate(), config=config, calibration=calibration)
    x = calibration.x
    hidden = _hidden(program, x)
    for (node, quantizer), value in zip(activation_quantizers(fake), (x, hidden), strict=True):
        low, high = ctx.stats["calibrate"]["ranges"][node.name]
        assert (low, high) == pytest.approx((float(value.min()), float(value.max())), rel=1e-5)
        scale, zero = affine_from_range(torch.tensor([low]), torch.tensor([high]), quantizer.spec)
        assert float(quantizer.scale) == pytest.approx(float(scale), rel=1e-5) and torch.equal(
            quantizer.zero_point, zero
        )
    for (_, quantizer), name in zip(weight_quantizers(fake), "ab", strict=True):
        assert torch.equal(
            quantizer.scale, minmax_weight(get_constant(program.graph_module, f"{name}.weight"), quantizer.spec)
        )


def test_calibrate_rule_1_the_search_beats_min_max_on_the_data():
    program, errors = _two_layers(act=4), {}
    calibration = random_calibration(program)
    x = calibration.x
    hidden = _hidden(program, x)
    for method in ("default", "minmax"):
        fake, _ = apply(
            program, InsertQuant(), Calibrate(), config=small_config(method=method), calibration=calibration
        )
        (quantizer,) = [m for _, m in activation_quantizers(fake) if m.spec.bits == 4]
        with torch.no_grad():
            errors[method] = float((quantizer(hidden) - hidden).square().mean())
    assert errors["default"] < errors["minmax"]


def test_calibrate_rule_1_sixteen_bits_keep_a_margin():
    fake, ctx = _calibrated(_two_layers())
    node, quantizer = next(iter(activation_quantizers(fake)))
    low, high = ctx.stats["calibrate"]["ranges"][node.name]
    assert (
        float(quantizer.scale) == pytest.approx(1.25 * max(high / 32639, -low / 32768), rel=1e-5)
        and float(quantizer.zero_point) == 0.0
    )


def test_calibrate_rule_2_weights_get_searched_scales():
    program = _two_layers()
    fake, _ = _calibrated(program)
    for (_, quantizer), name in zip(weight_quantizers(fake), "ab", strict=True):
        assert torch.equal(
            quantizer.scale, search_weight(get_constant(program.graph_module, f"{name}.weight"), quantizer.spec)
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    program = _two_layers()
    calibration = random_calibration(program)
    weight = get_constant(program.graph_module, "b.weight")
    weight[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"weight b\.weight"):
        apply(program, InsertQuant(), Calibrate(), config=small_config(), calibration=calibration)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_activations_that_are_not_finite_are_refused(bad, position):
    observer = ActivationObserver()
    batches = [torch.randn(20), torch.randn(20)]
    batches[position][7] = bad
    for batch in batches:
        observer.update(batch, 10, torch.Generator())
    with pytest.raises(CalibrationError, match="input of layer here is not finite"):
        observer.affine(ActFakeQuant(act_spec(8)), "here", METHODS["default"])


# mean_correction


def _quantized_copy(program, config):
    fake, ctx = _calibrated(program, config)
    return fake, run_passes(fake, [MeanCorrection()], ctx), ctx


def test_mean_correction_rule_1_removes_the_mean_error_of_every_step():
    program, config = _two_layers(weight=2, act=3), small_config()
    fake, corrected, ctx = _quantized_copy(program, config)
    kept = ctx.calibration.trajectories
    assert corrected.time.keys.tolist() == [0.0, 25.0, 50.0, 75.0]
    for x, t, prediction in zip(kept.x, kept.t, kept.prediction, strict=True):
        with torch.no_grad():
            before = (prediction - fake(x, t.expand(3))).double().mean(dim=(0, 2, 3))
            after = (prediction - corrected(x, t.expand(3))).double().mean(dim=(0, 2, 3))
        row = corrected.time.lookup(t.reshape(1))[INPUT][0]
        assert float(before.abs().max()) > 1e-3
        assert_close(row, before.float(), depth=4096)
        assert float(after.abs().max()) <= 1e-5


def test_mean_correction_is_off_when_asked_and_for_the_baseline():
    for config in (small_config(mean_correction=False), small_config(method="minmax")):
        fake, corrected, _ = _quantized_copy(_two_layers(), config)
        assert corrected.time is None and count_ops(corrected) == count_ops(fake)


def test_mean_correction_joins_existing_tables():
    keys = torch.tensor([0.0, 10.0], dtype=torch.float64)
    rows = torch.tensor([[1.0], [3.0]])
    assert merge_table(None, keys, rows).tables == {INPUT: rows}
    same = merge_table(TimeTables(keys, {"time_0": torch.zeros(2, 4)}, path_outputs=("time_0",)), keys, rows)
    assert set(same.tables) == {"time_0", INPUT} and torch.equal(same.tables[INPUT], rows)
    whole = TimeTables(torch.arange(21, dtype=torch.float64), {"time_0": torch.zeros(21, 4)}, path_outputs=("time_0",))
    filled = merge_table(whole, keys, rows).tables[INPUT]
    assert filled.shape == (21, 1) and filled[[0, 5, 10, 20], 0].tolist() == [1.0, 2.0, 3.0, 3.0]


# freeze


@pytest.mark.parametrize(("weight", "act"), [(4, 8), (8, 8), (2, 3), (6, 16)])
def test_freeze_keeps_every_value(weight, act):
    fake, qdq, _, _ = _frozen(_two_layers(weight, act))
    for seed in (1, 2):
        inputs = inputs_for(fake, seed=seed)
        with torch.no_grad():
            assert torch.equal(qdq(*inputs), fake(*inputs))
    ops = count_ops(qdq)
    assert (
        ops["edadm.quantize.default"] == ops["edadm.dequantize.default"] == ops["edadm.dequantize_weight.default"] == 2
    )


def test_freeze_rule_1_scales_and_zero_points_become_constants():
    fake, qdq, _, _ = _frozen(_two_layers())
    for (_, quantizer), node in zip(activation_quantizers(fake), nodes_of(qdq, "edadm.quantize.default"), strict=True):
        scale, zero = (get_constant(qdq.graph_module, a.target) for a in node.args[1:3])
        assert torch.equal(scale, quantizer.scale.detach()) and torch.equal(zero, quantizer.zero_point)
        assert node.args[3:] == (quantizer.spec.bits, quantizer.spec.symmetric)


def test_freeze_rule_2_codes_are_packed_and_the_float_weight_leaves():
    fake, qdq, _, _ = _frozen(_two_layers())
    targets = {str(n.target) for n in qdq.graph_module.graph.nodes if n.op == "get_attr"}
    assert not {"a.weight", "b.weight"} & targets and {"a.weight_q", "b.weight_q", "a.bias", "b.bias"} <= targets
    assert not any(
        name in ("a.weight", "b.weight")
        for name, _ in [*qdq.graph_module.named_parameters(), *qdq.graph_module.named_buffers()]
    )
    (_, quantizer) = list(weight_quantizers(fake))[1]
    packed = get_constant(qdq.graph_module, "b.weight_q")
    weight = get_constant(fake.graph_module, "b.weight")
    assert packed.dtype == torch.uint8 and torch.equal(
        packing.unpack(packed, 4, weight.shape), quantizer.integer_codes(weight)
    )


def test_freeze_rule_2_transposed_convolutions_store_output_channels_first():
    _, qdq, lowered, _ = _frozen(_transposed_program())
    (node,) = nodes_of(qdq, "edadm.dequantize_weight.default")
    assert list(node.args[3]) == [6, 4, 3, 2] and node.args[4] == 1
    assert not [r.failure for r in check_layers(qdq, lowered, inputs_for(qdq)) if r.failure]


# lower


def _transposed_program():
    build = GraphBuilder()
    weight, bias = build.constant("up.weight", build.random(4, 6, 3, 2)), build.constant("up.bias", build.random(6))
    out = build.op("aten.conv_transpose2d.input", build.x, weight, bias, [2, 3], [1, 0], [1, 2], 1, [1, 2])
    out.meta["layer"] = LayerInfo("up", "conv_transpose2d", (4, 6, 3, 2), "inner", 4, 8)
    return build.program(out)


def _conv_program(bias=True, groups=1):
    build = GraphBuilder()
    weight = build.constant("c.weight", build.random(6, 4 // groups, 3, 3))
    b = build.constant("c.bias", build.random(6)) if bias else None
    out = build.op("aten.conv2d.default", build.x, weight, b, [2, 1], [1, 2], [1, 2], groups)
    out.meta["layer"] = LayerInfo("c", "conv2d", (6, 4 // groups, 3, 3), "inner", 4, 8)
    return build.program(out)


def _linear_program():
    build = GraphBuilder()
    tokens = build.op(
        "aten.transpose.int",
        build.op("aten.reshape.default", build.op("aten.silu.default", build.x), [-1, 4, 64]),
        1,
        2,
    )
    return build.program(build.linear("l", tokens, 4, 5))


def _matmul_program():
    build = GraphBuilder(x=(2, 6, 6))
    return build.program(_product(build))


_LOWERINGS = {
    "rule 1": (_conv_program, "edadm.qconv2d.default", 1),
    "rule 1 without bias": (lambda: _conv_program(bias=False), "edadm.qconv2d.default", 1),
    "rule 1 in groups": (lambda: _conv_program(groups=2), "edadm.qconv2d.default", 1),
    "rule 2": (_transposed_program, "edadm.qconv_transpose2d.default", 1),
    "rule 3": (_linear_program, "edadm.qlinear.default", 1),
    "rule 4": (_matmul_program, "edadm.qmatmul.default", 1),
    "two layers": (_two_layers, "edadm.qconv2d.default", 2),
    "narrow": (lambda: _two_layers(2, 3), "edadm.qconv2d.default", 2),
    "sixteen bits": (lambda: _two_layers(6, 16), "edadm.qconv2d.default", 2),
}


@pytest.mark.parametrize("name", list(_LOWERINGS))
def test_lowering(name):
    build, operator, count = _LOWERINGS[name]
    _, qdq, lowered, _ = _frozen(build())
    ops = count_ops(lowered)
    assert ops[operator] == count and not {
        n for n in ops if "dequantize" in n or n.startswith(("aten.conv", "aten.linear", "aten.matmul"))
    }
    reports = check_layers(qdq, lowered, inputs_for(qdq, batch=4))
    assert len(reports) == count and all(
        r.accumulators_equal and r.error_over_bound <= 1 and not r.failure for r in reports
    )
    propagate_shapes(lowered)
    if count == 1:  # one layer: no code can flip on the way, so the whole output obeys the layer's bound
        inputs = inputs_for(qdq, batch=2, seed=7)
        with torch.no_grad():
            assert_close(lowered(*inputs), qdq(*inputs), depth=4096)
    assert all(layer_of(n).executed.startswith("w") for n in lowered.graph_module.graph.nodes if layer_of(n))


def test_the_zero_point_is_folded_into_the_bias():
    _, qdq, lowered, _ = _frozen(_conv_program())
    m, b = (get_constant(lowered.graph_module, f"c.{n}").double() for n in ("multiplier", "bias_q"))
    (quantize,), (weight,) = nodes_of(qdq, "edadm.quantize.default"), nodes_of(qdq, "edadm.dequantize_weight.default")
    scale, zero = (get_constant(qdq.graph_module, a.target).double() for a in quantize.args[1:3])
    codes = packing.unpack(get_constant(qdq.graph_module, "c.weight_q"), 4, weight.args[3]).double()
    w_scale = get_constant(qdq.graph_module, "c.weight_scale").double()
    assert float(zero) != 0
    expected = get_constant(qdq.graph_module, "c.bias").double() - scale * w_scale * zero * codes.flatten(1).sum(dim=1)
    assert torch.allclose(m, scale * w_scale, rtol=2.0**-23, atol=0)
    assert float((b - expected).abs().max()) <= 2.0**-22 * float(expected.abs().max())
    (node,) = nodes_of(lowered, "edadm.qconv2d.default")
    assert node.args[4] == int(zero)


def test_the_truth_table_says_what_runs():
    for (weight, act), executed, note in (
        ((4, 8), "w4a8", ""),
        ((8, 16), "w8a16", ""),
        ((3, 6), "w4a8", "3/6-bit codes in 4/8-bit kernels"),
    ):
        *_, lowered, _ = _frozen(_two_layers(weight, act))
        info = {i.name: i for n in lowered.graph_module.graph.nodes if (i := layer_of(n))}["b"]
        assert (info.executed, info.note) == (executed, note)


def test_float_layers_keep_their_reason():
    build = GraphBuilder()
    conv = build.conv("a", build.x, 4, 4)
    conv.meta["layer"] = dataclasses.replace(conv.meta["layer"], weight_bits=32, act_bits=32, note="asked for")
    qdq, _ = apply(build.program(conv, "qdq"), Lower(), config=QuantConfig())
    (info,) = [i for n in qdq.graph_module.graph.nodes if (i := layer_of(n))]
    assert (info.executed, info.note) == ("float", "asked for")


def test_weights_never_hold_a_code_their_storage_has_not():
    for bits in (2, 3, 4, 5, 8):
        _, qdq, _, _ = _frozen(_two_layers(bits, 8))
        (node,) = [n for n in nodes_of(qdq, "edadm.dequantize_weight.default") if n.args[0].target == "b.weight_q"]
        codes = packing.unpack(get_constant(qdq.graph_module, "b.weight_q"), bits, node.args[3])
        spec = weight_spec(bits)
        assert int(codes.min()) >= spec.qmin and int(codes.max()) <= spec.qmax


def test_contexts_hold_what_passes_report():
    _, _, _, ctx = _frozen(_two_layers())
    assert isinstance(ctx, Context) and ctx.stats["lower"]["executed"] == {"w8a16": 1, "w4a8": 1}
