import dataclasses

import pytest
import torch
from torch import nn

from edadm_compile.errors import DialectError
from edadm_compile.ir.dialects import LEGAL, illegal_ops, verify
from edadm_compile.ir.program import LayerInfo, TimeTables
from edadm_compile.quant.fake_quant import ActFakeQuant
from edadm_compile.quant.spec import act_spec
from tests.graphs import GraphBuilder


def _good(dialect="float"):
    build = GraphBuilder()
    return build, build.program(build.op("aten.silu.default", build.conv("inner", build.x, 4, 4)), dialect)


def _recompiled(program):
    program.graph_module.recompile()
    return program


@pytest.mark.parametrize("dialect", ["float", "fake_quant", "qdq"])
def test_a_float_graph_is_legal_in_every_simulated_dialect(dialect):
    verify(_good(dialect)[1])


def test_an_operator_outside_the_dialect_is_named():
    build = GraphBuilder()
    bad = build.op("aten.randn_like.default", build.x)
    with pytest.raises(
        DialectError, match=f"node {bad.name}: operator aten.randn_like.default is not legal in dialect float"
    ):
        verify(build.program(bad, shapes=False))
    assert illegal_ops(build.graph, "float") == ["aten.randn_like.default"]


def test_quantize_is_not_legal_in_float():
    build = GraphBuilder()
    scale, zero = build.constant("s", torch.ones(1)), build.constant("z", torch.zeros(1))
    codes = build.op("edadm.quantize.default", build.x, scale, zero, 8, False)
    value = build.op("edadm.dequantize.default", codes, scale, zero)
    program = build.program(value, "qdq")
    verify(program)
    verify(dataclasses.replace(program, dialect="lowered"))
    for dialect in ("float", "fake_quant"):
        with pytest.raises(DialectError, match=r"edadm\.quantize\.default"):
            verify(dataclasses.replace(program, dialect=dialect))


def test_method_calls_are_never_legal():
    build = GraphBuilder()
    node = build.graph.call_method("relu", (build.x,))
    with pytest.raises(DialectError, match=f"node {node.name}"):
        verify(build.program(node, shapes=False))


@pytest.mark.parametrize(
    ("module", "dialect"),
    [(nn.ReLU(), "fake_quant"), (ActFakeQuant(act_spec(8)), "float"), (ActFakeQuant(act_spec(8)), "qdq")],
)
def test_only_quantizers_may_be_called_and_only_in_fake_quant(module, dialect):
    build = GraphBuilder()
    build.root.add_module("inner", module)
    node = build.graph.call_module("inner", (build.x,))
    with pytest.raises(DialectError, match=f"node {node.name}: module inner"):
        verify(build.program(node, dialect, shapes=False))


def test_a_quantizer_is_legal_in_fake_quant():
    build = GraphBuilder()
    build.root.add_module("inner", ActFakeQuant(act_spec(8)))
    verify(build.program(build.graph.call_module("inner", (build.x,)), "fake_quant", shapes=False))


def test_dead_constants_are_named():
    build = GraphBuilder()
    build.constant("leftover", torch.ones(1))
    with pytest.raises(DialectError, match="node leftover: dead constant leftover"):
        verify(build.program(build.op("aten.silu.default", build.x)))


def test_missing_constants_are_named():
    _, program = _good()
    del program.graph_module.inner.weight
    with pytest.raises(
        DialectError, match=r"node inner_weight: constant inner.weight does not exist|malformed.*inner.weight"
    ):
        verify(program)


def test_a_constant_that_is_no_tensor_is_refused():
    _, program = _good()
    del program.graph_module.inner.weight
    program.graph_module.inner.weight = 3.0
    with pytest.raises(DialectError, match=r"inner\.weight"):
        verify(program)


def test_a_float_layer_in_a_lowered_graph_needs_a_reason():
    build, program = _good("lowered")
    with pytest.raises(DialectError, match="layer inner stays float without a reason"):
        verify(program)
    layer = next(n for n in build.graph.nodes if "layer" in n.meta)
    for node in program.graph_module.graph.nodes:
        if "layer" in node.meta:
            node.meta["layer"] = LayerInfo("inner", "conv2d", (4, 4, 3, 3), note="because")
    assert layer is not None
    verify(program)


def test_malformed_graphs_are_refused():
    _, program = _good()
    silu = next(n for n in program.graph_module.graph.nodes if str(n.target) == "aten.silu.default")
    silu.prepend(program.graph_module.graph.output_node())  # reads a value that comes later
    with pytest.raises(DialectError, match="malformed"):
        verify(program)


def test_inputs_must_be_those_of_the_signature():
    _, program = _good()
    wrong = dataclasses.replace(program.signature, inputs=program.signature.inputs[::-1])
    with pytest.raises(DialectError, match="graph inputs are"):
        verify(dataclasses.replace(program, signature=wrong))
    with pytest.raises(DialectError, match="graph inputs are"):
        verify(dataclasses.replace(program, time=TimeTables(torch.zeros(1), {"time_0": torch.zeros(1, 3)})))


def test_every_dialect_has_its_operators():
    assert set(LEGAL) == {"float", "fake_quant", "qdq", "lowered"}
