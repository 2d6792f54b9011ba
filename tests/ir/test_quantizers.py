"""Rewrites around quantizers: the same values, and only where they apply."""

import pytest
import torch
from torch import fx

from edadm_compile.ir.quantizers import QUANTIZE, drop_identity, quantize_first, share_quantizer, zero_padding
from tests.graphs import GraphBuilder


class Codes(fx.Interpreter):
    """Runs a graph with codes held in float32: torch has no nearest upsampling of int8."""

    def run_node(self, n):
        value = super().run_node(n)
        return value.float() if n.op == "call_function" and value.dtype in (torch.int8, torch.int16) else value


def build_graph(shape=(4, 6, 5)):
    build = GraphBuilder(x=shape)
    for name, value in (("scale", 0.05), ("other", 0.06), ("zero", 3.0), ("elsewhere", -2.0)):
        build.constant(name, torch.tensor([value]))
    return build


def quantize(build, x, scale="scale", zero="zero", bits=8, symmetric=False):
    """A quantizer with `get_attr` nodes of its own, as `freeze` writes it."""
    constants = [build.graph.get_attr(name) for name in (scale, zero)]
    return build.op(QUANTIZE, x, *constants, bits, symmetric)


def run(build, x):
    with torch.no_grad():
        return Codes(fx.GraphModule(build.root, build.graph)).run(x, torch.zeros(len(x)))


def value_of(build):
    return torch.randn(3, *build.specs[0].shape, generator=torch.Generator().manual_seed(1)) * 5


# drop_identity


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.div.Tensor", (1,)), ("aten.div.Tensor", (1.0,)), ("aten.div.Scalar", (1,)), ("aten.mul.Tensor", (1,)),
        ("aten.mul.Scalar", (1.0,)), ("aten.alias.default", ()), ("aten.contiguous.default", ()),
        ("aten.detach.default", ()), ("aten.dropout.default", (0.5, False)),
        ("aten.permute.default", ([0, 1, 2, 3],)),
    ],
)  # fmt: skip
def test_identities_are_dropped(name, args):
    build = build_graph()
    before = build.op("aten.neg.default", build.x)
    node = build.op(name, before, *args)
    reader = build.op("aten.add.Tensor", node, node)
    build.graph.output(reader)
    expected = run(build, value_of(build))
    assert drop_identity(node) and reader.args == (before, before) and not node.users
    assert torch.equal(run(build, value_of(build)), expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.div.Tensor", (2,)), ("aten.mul.Tensor", (-1,)), ("aten.mul.Scalar", (1.0000001,)),
        ("aten.add.Tensor", (1,)), ("aten.sub.Tensor", (1,)), ("aten.pow.Tensor_Scalar", (2,)),
        ("aten.permute.default", ([0, 1, 3, 2],)), ("aten.transpose.int", (1, 1)), ("aten.clone.default", ()),
        ("aten.silu.default", ()),
    ],
)  # fmt: skip
def test_other_operators_stay(name, args):
    build = build_graph()
    node = build.op(name, build.x, *args)
    output = build.graph.output(node)
    assert not drop_identity(node) and output.args == (node,)


def test_a_factor_that_is_a_tensor_stays():
    build = build_graph()
    node = build.op("aten.mul.Tensor", build.x, build.constant("ones", torch.ones(1)))
    build.graph.output(node)
    assert not drop_identity(node)


# quantize_first

MOVES = {
    "reshape": ("aten.reshape.default", ([-1, 4, 30],), {}),
    "view": ("aten.view.default", ([-1, 24, 5],), {}),
    "permute": ("aten.permute.default", ([0, 2, 3, 1],), {}),
    "transpose": ("aten.transpose.int", (1, 3), {}),
    "contiguous": ("aten.contiguous.default", (), {}),
    "clone": ("aten.clone.default", (), {"memory_format": torch.contiguous_format}),
    "unsqueeze": ("aten.unsqueeze.default", (1,), {}),
    "flatten": ("aten.flatten.using_ints", (2,), {}),
    "movedim": ("aten.movedim.int", (1, 3), {}),
    "upsample": ("aten.upsample_nearest2d.vec", (None, [2.0, 2.0]), {}),
}


@pytest.mark.parametrize("name", list(MOVES))
def test_codes_are_moved_in_place_of_values(name):
    target, args, kwargs = MOVES[name]
    build = build_graph()
    source = build.op("aten.neg.default", build.x)
    moved = build.op(target, source, *args, **kwargs)
    moved.meta.update(layer="of the move", mark="of the move")
    quantizer = quantize(build, moved)
    quantizer.meta["mark"] = "of the quantizer"
    build.graph.output(quantizer)
    expected = run(build, value_of(build))
    assert quantize_first(quantizer) and not quantizer.users
    build.graph.lint()
    last = build.graph.output_node().args[0]
    assert last.target is moved.target and last.args[1:] == moved.args[1:] and last.kwargs == moved.kwargs
    codes = last.args[0]
    assert codes.target is quantizer.target and codes.args == (source, *quantizer.args[1:])
    assert codes.meta["mark"] == "of the quantizer" and last.meta["mark"] == "of the move" and "layer" not in last.meta
    found = run(build, value_of(build))
    assert found.shape == expected.shape and torch.equal(found, expected)
    assert len(set(expected.flatten().tolist())) > 50


def test_several_moves_are_passed_one_after_the_other():
    build = build_graph()
    source = build.op("aten.silu.default", build.x)
    value = build.op("aten.transpose.int", build.op("aten.reshape.default", source, [-1, 4, 30]), 1, 2)
    build.graph.output(quantize(build, value))
    expected = run(build, value_of(build))
    for _ in range(2):
        (quantizer,) = [n for n in build.graph.nodes if str(n.target) == QUANTIZE and n.users]
        assert quantize_first(quantizer)
    (quantizer,) = [n for n in build.graph.nodes if str(n.target) == QUANTIZE and n.users]
    assert quantizer.args[0] is source and not quantize_first(quantizer)
    assert torch.equal(run(build, value_of(build)), expected)


def test_a_move_that_others_read_stays_for_them():
    build = build_graph()
    moved = build.op("aten.transpose.int", build.op("aten.neg.default", build.x), 1, 2)
    quantizer = quantize(build, moved)
    other = build.op("aten.add.Tensor", moved, 1)
    build.graph.output(build.op("aten.add.Tensor", quantizer, other))
    expected = run(build, value_of(build))
    assert quantize_first(quantizer) and other.args[0] is moved
    assert torch.equal(run(build, value_of(build)), expected)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.silu.default", ()), ("aten.mul.Tensor", (2,)), ("aten.upsample_bilinear2d.vec", (None, False, [2.0, 2.0])),
        ("aten.avg_pool2d.default", ([2, 2],)), ("aten.constant_pad_nd.default", ([1, 1],)),
    ],
)  # fmt: skip
def test_values_that_are_computed_are_quantized_behind(name, args):
    build = build_graph()
    quantizer = quantize(build, build.op(name, build.x, *args))
    output = build.graph.output(quantizer)
    assert not quantize_first(quantizer) and output.args == (quantizer,)


def test_inputs_and_other_nodes_are_left_alone():
    build = build_graph()
    quantizer = quantize(build, build.x)
    moved = build.op("aten.transpose.int", quantizer, 1, 2)
    build.graph.output(moved)
    assert not quantize_first(quantizer) and not quantize_first(moved)


# share_quantizer


def test_equal_quantizers_of_one_value_become_the_first():
    build = build_graph()
    source = build.op("aten.neg.default", build.x)
    quantizers = [quantize(build, source) for _ in range(3)]
    total = build.op("aten.add.Tensor", build.op("aten.add.Tensor", quantizers[2], quantizers[1]), quantizers[0])
    build.graph.output(total)
    expected = run(build, value_of(build))
    assert share_quantizer(quantizers[1])  # asked in the middle: the first in the graph stays
    assert total.args[1] is quantizers[0] and total.args[0].args == (quantizers[0], quantizers[0])
    assert [len(q.users) for q in quantizers] == [2, 0, 0]
    assert not share_quantizer(quantizers[0])  # the others have no readers any more
    build.graph.lint()
    assert torch.equal(run(build, value_of(build)), expected)


@pytest.mark.parametrize(
    "change",
    [{"scale": "other"}, {"zero": "elsewhere"}, {"bits": 4}, {"symmetric": True}, {"bits": 16}],
    ids=str,
)
def test_quantizers_that_differ_stay(change):
    build = build_graph()
    source = build.op("aten.neg.default", build.x)
    one, two = quantize(build, source), quantize(build, source, **change)
    total = build.op("aten.add.Tensor", one, two)
    build.graph.output(total)
    assert not share_quantizer(one) and not share_quantizer(two) and total.args == (one, two)


def test_quantizers_of_two_values_stay():
    build = build_graph()
    one, two = (quantize(build, build.op(f"aten.{name}.default", build.x)) for name in ("neg", "silu"))
    build.graph.output(build.op("aten.add.Tensor", one, two))
    assert not share_quantizer(one) and not share_quantizer(two)
    assert not share_quantizer(build.graph.output_node().args[0])


# zero_padding


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "widths"),
    [
        ("aten.constant_pad_nd.default", ([1, 2],), {}, [1, 2, 0, 0]),
        ("aten.constant_pad_nd.default", ([1, 2, 3, 4],), {}, [1, 2, 3, 4]),
        ("aten.constant_pad_nd.default", ([0, 1, 0, 1], 0), {}, [0, 1, 0, 1]),
        ("aten.constant_pad_nd.default", ([0, 1, 0, 1], 0.0), {}, [0, 1, 0, 1]),
        ("aten.pad.default", ([0, 1, 0, 1],), {}, [0, 1, 0, 1]),
        ("aten.pad.default", ([0, 1, 0, 1], "constant"), {}, [0, 1, 0, 1]),
        ("aten.pad.default", ([0, 1, 0, 1], "constant", None), {}, [0, 1, 0, 1]),
        ("aten.pad.default", ([0, 1, 0, 1], "constant", 0.0), {}, [0, 1, 0, 1]),
        ("aten.pad.default", ([0, 1, 0, 1], "constant", 1.0), {}, None),
        ("aten.pad.default", ([0, 1, 0, 1], "reflect"), {}, None),
        ("aten.pad.default", ([0, 1, 0, 1], "replicate", None), {}, None),
        ("aten.pad.default", ([0, 1, 0, 1],), {"mode": "circular"}, None),
        ("aten.constant_pad_nd.default", ([0, 1, 0, 1], -0.5), {}, None),
        ("aten.constant_pad_nd.default", ([0, 1],), {"value": 2.0}, None),
        ("aten.constant_pad_nd.default", ([-1, -1, -1, -1],), {}, None),
        ("aten.constant_pad_nd.default", ([1, 1, 0, -1],), {}, None),
        ("aten.constant_pad_nd.default", ([1, 1, 1, 1, 1, 1],), {}, None),  # channels too
        ("aten.reshape.default", ([4, 2],), {}, None),
    ],
    ids=str,
)
def test_zero_paddings(name, args, kwargs, widths):
    build = build_graph()
    node = build.op(name, build.x, *args, **kwargs)
    assert zero_padding(node) == widths
    if widths:  # what they mean
        build.graph.output(node)
        x, (left, right, top, bottom) = value_of(build), widths
        expected = torch.zeros(3, 4, 6 + top + bottom, 5 + left + right)
        expected[:, :, top : top + 6, left : left + 5] = x
        assert torch.equal(run(build, x), expected)


def test_what_is_no_operator_is_no_padding():
    build = build_graph()
    assert zero_padding(build.x) is None and zero_padding(None) is None and zero_padding(3) is None
