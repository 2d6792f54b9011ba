import logging

import pytest
import torch

from edadm_compile.ir.analysis import (
    BATCH,
    constant_target,
    dependencies,
    is_batched,
    is_layer,
    layer_weight,
    propagate_shapes,
    scope_of,
    shape_of,
    shapes_only,
    topological,
    weight_node,
    x_dependent,
)
from edadm_compile.quant.fake_quant import WeightFakeQuant
from edadm_compile.quant.spec import weight_spec
from tests.graphs import GraphBuilder


def test_dependencies_tell_values_from_sizes():
    build = GraphBuilder(text=(5,))
    size = build.op("aten.sym_size.int", build.x, 0)
    zeros = build.op("aten.zeros.default", [size, 4])
    time = build.op("aten._to_copy.default", build.t, dtype=torch.float32)
    mixed = build.op("aten.add.Tensor", zeros, build.op("aten.unsqueeze.default", time, 1))
    text = build.op("aten.sum.dim_IntList", build.conditions[0], [1], True)
    whole = build.op(
        "aten.mul.Tensor",
        build.x,
        build.op("aten.reshape.default", build.op("aten.add.Tensor", mixed, text), [-1, 4, 1, 1]),
    )
    constant = build.constant("c", torch.ones(1))
    graph = build.program(build.op("aten.add.Tensor", whole, constant)).graph_module.graph
    deps = {n.name: d for n, d in dependencies(graph).items()}
    assert deps[size.name] == deps[zeros.name] == {BATCH}
    assert deps[time.name] == {"t"} and deps[mixed.name] == {"t", BATCH}
    assert deps[text.name] == {"text"} and deps["c"] == frozenset()
    assert deps[whole.name] == {"x", "t", "text", BATCH}
    dependent = {n.name for n in x_dependent(graph)}
    assert (
        whole.name in dependent
        and zeros.name not in dependent
        and size.name not in dependent
        and text.name not in dependent
    )


def test_layers_are_operators_with_a_constant_weight():
    build = GraphBuilder()
    conv = build.conv("c", build.x, 4, 4)
    assert is_layer(conv) and weight_node(conv).target == "c.weight"
    computed = build.op("aten.conv2d.default", build.x, build.op("aten.neg.default", conv.args[1]))
    assert not is_layer(computed) and weight_node(computed) is None and not is_layer(build.x)
    quantizer = WeightFakeQuant(weight_spec(4), 4)
    build.root.add_module("q", quantizer)
    behind = build.op("aten.conv2d.default", build.x, build.graph.call_module("q", (conv.args[1],)))
    named = build.op("aten.conv2d.default", build.x, weight=conv.args[1])
    assert is_layer(behind) and weight_node(behind).target == weight_node(named).target == "c.weight"
    program = build.program(build.op("aten.add.Tensor", conv, behind), "fake_quant", shapes=False)
    layer = next(n for n in program.graph_module.graph.nodes if is_layer(n))
    assert layer_weight(program, layer).shape == (4, 4, 3, 3)
    assert constant_target(build.x) is None and constant_target(3) is None


def test_shapes_and_batches_are_found_without_computing():
    build = GraphBuilder(x=(4, 2, 2))
    flat = build.op(
        "aten.reshape.default", build.x, [-1, 4]
    )  # 4 rows per sample: the batch is no longer in front alone
    total = build.op("aten.sum.default", build.x)
    split = build.op("aten.split.Tensor", build.x, 2, 1).name  # a list of tensors, not a tensor
    out = build.op("aten.mul.Tensor", build.x, build.op("aten.mul.Tensor", total, build.op("aten.sum.default", flat)))
    program = build.program(out)
    propagate_shapes(program)
    found = {n.name: (shape_of(n), is_batched(n), n.meta.get("dtype")) for n in program.graph_module.graph.nodes}
    assert found["x"] == ((2, 4, 2, 2), True, torch.float32) and found["t"] == ((2,), True, torch.int64)
    assert found[flat.name] == ((8, 4), False, torch.float32)
    assert found[total.name] == ((), False, torch.float32)
    assert found[split] == ((), False, None)
    assert found["output"][1] is True


def test_scopes_and_order():
    build = GraphBuilder()
    conv = build.conv("a.b", build.x, 4, 4, scope=("a", "a.b"))
    out = build.op("aten.silu.default", conv)
    assert scope_of(conv) == ("a", "a.b") and scope_of(build.x) == ()
    assert topological([out, conv], build.graph) == [conv, out]


def test_shapes_that_do_not_fit_raise_and_log_nothing():
    records = []
    handler, logger = logging.Handler(), logging.getLogger("torch._subclasses.fake_tensor")
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        with shapes_only(), pytest.raises(RuntimeError, match="broadcast"):
            torch.ops.aten.add.Tensor(torch.ones(4), torch.ones(11, 11))
        assert not records
        logger.error("heard")
        assert len(records) == 1
    finally:
        logger.removeHandler(handler)
