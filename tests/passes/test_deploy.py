"""Convolution outputs as codes: where quantizers stand, what their ranges are, and that reconstruction sees them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from edadm_compile.config import QuantConfig, ReconstructionConfig
from edadm_compile.errors import CalibrationError
from edadm_compile.ir.program import get_constant, layer_of, layers
from edadm_compile.ir.subgraph import find_units, output_of
from edadm_compile.passes.base import run_passes
from edadm_compile.passes.calibrate import Calibrate
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.reconstruct import Reconstruct
from edadm_compile.quant.observers import affine_from_range
from edadm_compile.quant.spec import act_spec
from tests.graphs import GraphBuilder, apply, assert_same_function, random_calibration, small_config

DEPLOY = {"deploy": "onnxruntime"}


def convolutions(program):
    return [n for n in program.graph_module.graph.nodes if (info := layer_of(n)) and info.kind.startswith("conv")]


def names(nodes):
    return {layer_of(n).name for n in nodes}


# insert_quant


def hand_written():
    """Codes come from a (read twice) and e (the output); b has a float output, c few channels, d a 16-bit input."""
    build = GraphBuilder(seed=2)
    a = build.conv("a", build.x, 4, 12)
    b = build.conv("b", build.op("aten.silu.default", a), 12, 10)
    b.meta["layer"] = replace(b.meta["layer"], float_output=True)
    c = build.conv("c", build.op("aten.silu.default", b), 10, 8)
    d = build.conv("d", c, 8, 12)
    d.meta["layer"] = replace(d.meta["layer"], act_bits=16)
    e = build.conv("e", build.op("aten.add.Tensor", a, d), 12, 9)
    return build.program(e)


def output_quantizers(program):
    return [n for n in program.graph_module.graph.nodes if n.op == "call_module" and n.meta.get("output_quantizer")]


def test_insert_quant_rule_3_a_quantizer_behind_what_writes_codes():
    program = hand_written()
    after, ctx = apply(program, InsertQuant(), config=QuantConfig(**DEPLOY))
    found = output_quantizers(after)
    assert [layer_of(q.args[0]).name for q in found] == ["a", "e"]
    assert ctx.stats["insert_quant"] == ctx.stats["insert_quant"] | {"output_quantizers": 2, "activation_quantizers": 5}
    for quantizer in found:
        module = after.graph_module.get_submodule(quantizer.target)
        assert module.spec == act_spec(8) and not module.enabled
        assert list(quantizer.args[0].users) == [quantizer]  # all its readers, the graph's output included
        assert layer_of(quantizer) is None
    assert sorted(u.name for u in found[0].users) == sorted(["silu_default", "add_tensor"])
    assert after.graph_module.graph.output_node().args[0] is found[1]
    assert_same_function(program, after, depth=0)  # nothing happens before calibration


def test_insert_quant_rule_3_is_for_onnx_runtime_only():
    after, ctx = apply(hand_written(), InsertQuant())
    assert not output_quantizers(after) and ctx.stats["insert_quant"]["output_quantizers"] == 0


def test_insert_quant_rule_3_a_reader_quantizes_the_codes_again():
    build = GraphBuilder(seed=2)
    program = build.program(build.conv("b", build.conv("a", build.x, 4, 12), 12, 4))
    after, _ = apply(program, InsertQuant(), config=QuantConfig(**DEPLOY))
    (quantizer,) = output_quantizers(after)
    (reader,) = quantizer.users
    assert reader.op == "call_module" and not reader.meta.get("output_quantizer")
    assert [layer_of(u).name for u in reader.users] == ["b"]


# calibrate


def calibrated(config, *, flat=False):
    """The program with its scales, and the values of each channel of "a"; `flat`: nearly all values are equal."""
    program = hand_written()
    calibration = random_calibration(program)
    if flat:
        x = torch.full_like(calibration.x, 0.37)
        x[2, 1, 4, 4] = 9.0
        calibration = replace(calibration, x=x)
    after, ctx = apply(program, InsertQuant(), Calibrate(), config=config, calibration=calibration)
    weight, bias = (get_constant(program.graph_module, f"a.{n}") for n in ("weight", "bias"))
    value = functional.conv2d(calibration.x, weight, bias, padding=1)
    return after, ctx, value.transpose(0, 1).flatten(1)


def test_calibrate_rule_3_the_range_of_each_channel_behind_the_convolution():
    after, ctx, channels = calibrated(small_config(method="minmax", **DEPLOY))
    first, last = output_quantizers(after)
    module = after.graph_module.get_submodule(first.target)
    scale, zero = affine_from_range(channels.amin(dim=1), channels.amax(dim=1), act_spec(8))
    assert module.enabled and module.scale.shape == module.zero_point.shape == (12, 1, 1)
    torch.testing.assert_close(module.scale.flatten(), scale, rtol=1e-5, atol=0)
    assert torch.equal(module.zero_point.flatten(), zero)
    assert after.graph_module.get_submodule(last.target).scale.shape == (9, 1, 1)
    assert all(info.out_scale is None and info.out_zero_point is None for info in layers(after))
    assert not {first.name, last.name} & set(ctx.stats["calibrate"]["ranges"])


def test_calibrate_rule_3_the_same_ranges_as_a_record_without_deploy():
    """Four digits of the scale, whole zero points; nothing for a convolution that writes no codes."""
    deployed, _, channels = calibrated(small_config(method="minmax", **DEPLOY))
    after, _, _ = calibrated(small_config(method="minmax"))
    records = {info.name: info for info in layers(after)}
    assert {n for n, info in records.items() if info.out_scale is not None} == {"a", "e"}
    assert {n for n, info in records.items() if info.out_zero_point is not None} == {"a", "e"}
    for name, quantizer in zip("ae", output_quantizers(deployed), strict=True):
        module, info = deployed.graph_module.get_submodule(quantizer.target), records[name]
        torch.testing.assert_close(torch.tensor(info.out_scale), module.scale.flatten(), rtol=5.1e-4, atol=0)
        assert all(float(f"{s:.4g}") == s for s in info.out_scale)
        assert list(info.out_zero_point) == module.zero_point.flatten().tolist()
        assert all(type(z) is int for z in info.out_zero_point)
    # 1 / 255 of the range, seen from outside
    assert records["a"].out_scale[3] == pytest.approx(float(channels[3].max() - channels[3].min()) / 255, rel=1e-3)


@pytest.mark.parametrize("method", ["minmax", "default"])
@pytest.mark.parametrize("deploy", [None, "onnxruntime"])
def test_calibrate_rule_3_the_search_shrinks_both_ends_alike(deploy, method):
    after, _, channels = calibrated(small_config(deploy=deploy, method=method), flat=True)
    if deploy:
        scale = after.graph_module.get_submodule(output_quantizers(after)[0].target).scale.flatten()
    else:
        scale = torch.tensor(layers(after)[0].out_scale)
    whole, _ = affine_from_range(channels.amin(dim=1), channels.amax(dim=1), act_spec(8))
    steps = (1 - scale / whole) * 16 / 0.6
    assert float((steps - steps.round()).abs().max()) < 0.02 and set(steps.round().tolist()) <= set(range(16))
    assert bool(steps.round().any()) == (method == "default")


def test_an_output_that_is_not_finite_is_refused_with_its_name():
    build = GraphBuilder(seed=2)
    program = build.program(build.conv("last", build.op("aten.mul.Scalar", build.x, 1e37), 4, 12))
    calibration = random_calibration(program)
    get_constant(program.graph_module, "last.weight").mul_(1e3)
    with pytest.raises(CalibrationError, match="the output of last is not finite"):
        apply(program, InsertQuant(), Calibrate(), config=small_config(), calibration=calibration)


# reconstruct


def test_units_end_behind_the_output_quantizer():
    after, _ = apply(hand_written(), InsertQuant(), config=QuantConfig(**DEPLOY))
    found = {layer_of(n).name: output_of(n) for n in convolutions(after)}
    quantizers = output_quantizers(after)
    assert found["a"] is quantizers[0] and found["e"] is quantizers[1]
    assert [layer_of(found[n]).name for n in "bcd"] == list("bcd")
    units = {unit.name: unit for unit in find_units(after)}
    assert units["e"].output is found["e"] and units["a"].output is found["a"]
    plain, _ = apply(hand_written(), InsertQuant())
    assert all(output_of(n) is n for n in convolutions(plain))


def phases(crop=(-1, -1, -1, -1)):
    build = GraphBuilder(seed=2)
    shuffled = build.op("aten.pixel_shuffle.default", build.conv("up", build.x, 4, 36), 2)
    cropped = build.op("aten.constant_pad_nd.default", shuffled, list(crop))
    return build.program(build.conv("last", build.op("aten.silu.default", cropped), 9, 4))


def test_phases_of_an_image_are_quantized_as_pixels():
    program = phases()
    after, _ = apply(
        program, InsertQuant(), Calibrate(), config=small_config(**DEPLOY), calibration=random_calibration(program)
    )
    (quantizer,) = output_quantizers(after)
    assert str(quantizer.args[0].target) == "aten.constant_pad_nd.default"
    assert after.graph_module.get_submodule(quantizer.target).scale.shape == (9, 1, 1)
    up, last = convolutions(after)
    assert output_of(up) is quantizer and output_of(last) is last
    (unit,) = [u for u in find_units(after) if names(u.layers) == {"up"}]
    kinds = [str(n.target).split(".")[1] for n in unit.nodes if n.op == "call_function"]
    assert kinds == ["conv2d", "pixel_shuffle", "constant_pad_nd"] and unit.output is quantizer


def test_other_crops_are_no_phases():
    after, _ = apply(phases((-1, -1, -1, 0)), InsertQuant(), config=small_config(**DEPLOY))
    (quantizer,) = output_quantizers(after)
    assert layer_of(quantizer.args[0]).name == "up"


def test_pieces_of_a_split_layer_stay_together_with_their_output_quantizers():
    build = GraphBuilder(seed=2)
    low = build.op("aten.silu.default", build.x)
    one, two = (build.conv(f"m.part{i}", v, 4, 12, split_of="cat") for i, v in enumerate((build.x, low)))
    total = build.op("aten.add.Tensor", one, two)
    total.meta["split_sum"] = True
    after, _ = apply(build.program(build.op("aten.silu.default", total)), InsertQuant(), config=QuantConfig(**DEPLOY))
    (unit,) = find_units(after)
    assert names(unit.layers) == {"m.part0", "m.part1"} and unit.output.meta["split_sum"]
    assert set(output_quantizers(after)) <= set(unit.nodes) and len(output_quantizers(after)) == 2


def test_reconstruction_trains_the_output_scales():
    config = small_config(reconstruction=ReconstructionConfig(iters=6, batch=8, lr_scale=0.05), **DEPLOY)
    after, ctx, _ = calibrated(config)
    modules = [after.graph_module.get_submodule(q.target) for q in output_quantizers(after)]
    before = [m.scale.clone() for m in modules]
    after = run_passes(after, [Reconstruct()], ctx)
    for module, old in zip(modules, before, strict=True):
        assert module.scale.shape == old.shape and bool((module.scale != old).all())
        assert not module.log_scale.requires_grad
