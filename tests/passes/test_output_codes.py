"""Which convolutions keep a float output: those whose codes hurt the prediction, as long as they are cheap."""

from dataclasses import replace

import pytest
import torch
from torch import fx

from edadm_compile.config import QuantConfig
from edadm_compile.ir.program import LayerInfo, layer_of, layers
from edadm_compile.passes import float_outputs
from edadm_compile.passes.base import Context
from edadm_compile.passes.float_outputs import FloatOutputs
from edadm_compile.passes.output_ranges import KEEP, ChannelObserver
from edadm_compile.passes.sensitivity import measurement_inputs
from tests.graphs import GraphBuilder, apply, count_ops, nodes_of, random_calibration, small_config

GROUPED, TRANSPOSED, STRIDED = "grouped", "transposed", "strided"


def convolution(build, name, x, inner, outer, kernel=3, form=""):
    """A convolution; `form` is one of those above or empty."""
    if form == GROUPED:
        shape = (outer, inner // 2, kernel, kernel)
        weight = build.constant(f"{name}.weight", build.random(*shape, scale=0.3))
        node = build.op("aten.conv2d.default", x, weight, None, [1, 1], [kernel // 2] * 2, [1, 1], 2)
        node.meta["layer"] = LayerInfo(name, "conv2d", shape, "inner", 4, 8)
        return node
    if form == TRANSPOSED:
        shape = (inner, outer, kernel, kernel)
        weight = build.constant(f"{name}.weight", build.random(*shape, scale=0.3))
        node = build.op("aten.conv_transpose2d.input", x, weight, None, [1, 1], [kernel // 2] * 2)
        node.meta["layer"] = LayerInfo(name, "conv_transpose2d", shape, "inner", 4, 8)
        return node
    node = build.conv(name, x, inner, outer, kernel)
    if form == STRIDED:
        node.args = (*node.args[:3], [2, 2], *node.args[4:])
    return node


def network(wild_kernel=1, wild_form="", first_form=""):
    """Three convolutions; the output of "wild" has outliers in every channel that a tanh cuts off behind it."""
    build = GraphBuilder(seed=5)
    h = convolution(build, "first", build.x, 4, 12, 3, first_form)
    spikes = build.op("aten.exp.default", build.op("aten.mul.Scalar", h, 4.0))
    h = build.op("aten.tanh.default", convolution(build, "wild", spikes, 12, 10, wild_kernel, wild_form))
    h = build.conv("last", h, 10, 16)
    return build.program(build.conv("head", h, 16, 4))


def chosen(program, config=None):
    after, ctx = apply(
        program, FloatOutputs(), config=config or small_config(), calibration=random_calibration(program)
    )
    stats = ctx.stats["float_outputs"]
    marked = [info.name for info in layers(after) if info.float_output]
    assert sorted(marked) == sorted(stats["float_outputs"])
    return stats["float_outputs"], stats, after, ctx


class _Coded(fx.Interpreter):
    """Runs a program with another value in place of one node's."""

    def __init__(self, program, node, change):
        super().__init__(program.graph_module)
        self.node, self.change = node, change

    def run_node(self, n):
        value = super().run_node(n)
        return self.change(value) if n is self.node else value


def test_the_cheap_convolution_with_outliers_is_chosen():
    program = network()
    names, stats, after, _ = chosen(program)
    assert names == ["wild"]
    assert max(stats["output_sensitivity"], key=stats["output_sensitivity"].get) == "wild"
    assert count_ops(after) == count_ops(program)
    before = {info.name: info for info in layers(program)}
    assert {info.name: replace(info, float_output=False) for info in layers(after)} == before


def test_the_sensitivity_is_the_error_of_coding_that_output_alone():
    """Recomputed by running the program once for each convolution, with codes computed in float64."""
    program = network()
    _, stats, _, ctx = chosen(program)
    inputs = program.graph_inputs(measurement_inputs(ctx.calibration.trajectories, program.signature))
    generator = Context(small_config()).generator(5)
    with torch.no_grad():
        exact = program.graph_module(*inputs).double()
    expected = {}
    for node in nodes_of(program, "aten.conv2d.default")[:3]:

        def code(value):
            observer = ChannelObserver()
            observer.update(value, KEEP, generator)
            scale, zero = (v.double()[:, None, None] for v in observer.affine("", minmax=False))
            codes = ((value.double() / scale).round() + zero).clamp(-128, 127)
            return ((codes - zero) * scale).float()

        with torch.no_grad():
            coded = _Coded(program, node, code).run(*inputs).double()
        expected[layer_of(node).name] = float((coded - exact).square().sum() / exact.square().sum())
    assert set(stats["output_sensitivity"]) == {"first", "wild", "last"}  # "head" has few channels: no codes anyway
    assert stats["output_sensitivity"] == pytest.approx(expected, rel=1e-3) and min(expected.values()) > 0


def test_an_expensive_convolution_is_not_chosen_however_much_it_hurts():
    names, stats, *_ = chosen(network(wild_kernel=5))
    assert max(stats["output_sensitivity"], key=stats["output_sensitivity"].get) == "wild" and names == []


@pytest.mark.parametrize(
    "config",
    [QuantConfig(uniform=True), QuantConfig(method="minmax"), QuantConfig(uniform=True, deploy="onnxruntime")],
    ids=["uniform", "minmax", "uniform for onnxruntime"],
)
def test_strict_widths_and_the_baseline_have_none(config, monkeypatch):
    monkeypatch.setattr(float_outputs, "values_of", lambda *a: pytest.fail("measured"))
    names, stats, *_ = chosen(network(), config)
    assert names == [] and stats["changed"] is False


def test_layers_that_write_no_codes_are_not_measured():
    program = network()
    for node in nodes_of(program, "aten.conv2d.default"):
        info = node.meta["layer"]
        if info.name == "first":
            node.meta["layer"] = replace(info, act_bits=16)
        if info.name == "wild":
            node.meta["layer"] = replace(info, weight_bits=32, act_bits=32)
    names, stats, *_ = chosen(program)
    assert set(stats["output_sensitivity"]) == {"last"} and "wild" not in names


@pytest.mark.parametrize(
    "form",
    [GROUPED, TRANSPOSED],
)
def test_convolutions_without_a_float_form_are_measured_but_not_chosen(form):
    names, stats, *_ = chosen(network(wild_form=form))
    assert max(stats["output_sensitivity"], key=stats["output_sensitivity"].get) == "wild" and names == []


def test_the_first_convolutions_of_models_too_large_to_measure(monkeypatch):
    monkeypatch.setattr(float_outputs, "values_of", lambda *a: pytest.fail("measured"))
    program = network()
    size = sum(torch.Size(info.weight_shape).numel() for info in layers(program) if info.name != "head")
    monkeypatch.setattr(float_outputs, "MEASURE_LIMIT", size - 1)
    names, stats, *_ = chosen(program)
    assert names == ["first", "wild"] and stats["output_sensitivity"] == {}
    monkeypatch.undo()
    monkeypatch.setattr(float_outputs, "MEASURE_LIMIT", size)
    assert chosen(program)[0] == ["wild"]


@pytest.mark.parametrize("form", [GROUPED, TRANSPOSED])
def test_models_too_large_to_measure_do_not_choose_convolutions_without_a_float_form(form, monkeypatch):
    monkeypatch.setattr(float_outputs, "MEASURE_LIMIT", 1)
    assert chosen(network(first_form=form))[0] == ["wild", "last"]


# the choice, for given errors


def row(*sizes, forms=None):
    """Convolutions of x with these numbers of output channels (1 x 1 kernels: cost as their channels)."""
    build, outputs = GraphBuilder(), []
    for i, size in enumerate(sizes):
        form = (forms or {}).get(i, "")
        outputs.append(build.op("aten.mean.default", convolution(build, f"c{i}", build.x, 4, size, 1, form)))
    total = build.op("aten.mul.Tensor", build.x, sum_of(build, outputs))
    program = build.program(total)
    return program, [n for n in program.graph_module.graph.nodes if layer_of(n)]


def sum_of(build, values):
    total = values[0]
    for value in values[1:]:
        total = build.op("aten.add.Tensor", total, value)
    return total


def picked(sizes, errors, **options):
    program, nodes = row(*sizes, **options)
    found = float_outputs._worst(program, dict(zip(nodes, errors, strict=True)))
    return [layer_of(n).name for n in found]


_ENOUGH = 10**-4.5


@pytest.mark.parametrize(
    ("sizes", "errors", "expected"),
    [
        ((10, 90), (1e-2, 1e-9), ["c0"]),
        ((10, 90), (_ENOUGH * 0.9, _ENOUGH * 0.09), []),  # together within the target
        ((10, 90), (_ENOUGH * 0.95, _ENOUGH * 0.1), ["c0"]),  # together beyond
        ((10, 90), (1e-2, 7.5e-3), []),  # 0.571 of the error for 0.1 of the products: less than 5.75 times
        ((10, 90), (1e-2, 7.3e-3), ["c0"]),
        ((15, 85), (1e-2, 1e-9), ["c0"]),  # 15 % of the products, just allowed
        ((16, 84), (1e-2, 1e-9), []),
        ((10, 6, 84), (1e-2, 5e-3, 1e-9), ["c0"]),  # the second would pass 15 %
        ((10, 5, 85), (1e-2, 4e-3, 1e-9), ["c0", "c1"]),
        ((2, 10, 88), (4e-3, 1e-2, 1e-9), ["c0", "c1"]),  # in the order of error for each product
        ((10, 2, 88), (1e-2, 1e-3, 1e-6), ["c0", "c1"]),  # what remains decides: c1 has little of the whole
        ((10, 2, 88), (1e-2, _ENOUGH * 0.9, 1e-9), ["c0"]),  # after c0 the rest is within the target
        ((14, 4, 1, 81), (2e-2, 2.8e-3, 6e-4, 1e-9), ["c0", "c2"]),  # one without room does not stop the next
    ],
)  # fmt: skip
def test_error_against_cost(sizes, errors, expected):
    assert picked(sizes, errors) == expected


def test_the_order_is_that_of_the_error_for_each_product():
    assert picked((6, 3, 3, 88), (6e-3, 6e-3, 2e-3, 1e-9)) == ["c1", "c0", "c2"]


def test_the_products_are_those_of_all_output_pixels():
    assert picked((40, 90), (1e-2, 1e-9), forms={0: STRIDED}) == ["c0"]  # a quarter of the pixels: 10 of 100
    assert picked((64, 84), (1e-2, 1e-9), forms={0: STRIDED}) == []


def test_grouped_convolutions_are_passed_over():
    assert picked((10, 4, 86), (1e-1, 1e-2, 1e-9), forms={0: GROUPED}) == []
    assert picked((10, 4, 86), (1e-2, 1e-2, 1e-9), forms={0: GROUPED}) == ["c1"]
