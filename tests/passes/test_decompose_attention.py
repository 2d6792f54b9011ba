import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.passes.decompose_attention import DecomposeAttention
from tests.graphs import GraphBuilder, apply, assert_same_function, count_ops

_INT8 = QuantConfig(attention="int8")


def _operands(build):
    """q [B, 2, 5, 4], k and v [B, 2, 3, 4] from x [B, 2, 5, 4]."""
    k = build.op("aten.slice.Tensor", build.op("aten.mul.Scalar", build.x, 2.0), 2, 0, 3)
    v = build.op("aten.slice.Tensor", build.op("aten.silu.default", build.x), 2, 1, 4)
    return build.x, k, v


@pytest.mark.parametrize("scale", [None, 0.3])
def test_rule_1_attention_becomes_two_products(scale):
    build = GraphBuilder(x=(2, 5, 4))
    before = build.program(
        build.op(
            "aten.scaled_dot_product_attention.default",
            *_operands(build),
            **({} if scale is None else {"scale": scale}),
        )
    )
    after, ctx = apply(before, DecomposeAttention(), config=_INT8)
    assert_same_function(before, after)
    ops = count_ops(after)
    assert (
        ops["aten.matmul.default"] == 2
        and ops["aten.softmax.int"] == 1
        and "aten.scaled_dot_product_attention.default" not in ops
    )
    assert ctx.stats["decompose_attention"]["decomposed"] == 1


@pytest.mark.parametrize("arguments", [{"is_causal": True}, {"mask": True}], ids=str)
def test_masked_attention_stays(arguments):
    build = GraphBuilder(x=(2, 5, 4))
    q, k, v = _operands(build)
    mask = build.constant("mask", torch.zeros(5, 3)) if arguments.pop("mask", False) else None
    before = build.program(
        build.op("aten.scaled_dot_product_attention.default", q, k, v, mask, 0.0, arguments.get("is_causal", False))
    )
    after, _ = apply(before, DecomposeAttention(), config=_INT8)
    assert_same_function(before, after, depth=0)
    assert count_ops(after)["aten.scaled_dot_product_attention.default"] == 1


@pytest.mark.parametrize(
    "equation", ["bhik,bhjk->bhij", "bhik, bhjk -> bhji", "hbik,hbjk->bhij", "bhki,bhkj->bhij", "bhik,bhjk->hibj"]
)
def test_rule_2_einsums_become_products(equation):
    build = GraphBuilder(x=(2, 4, 4))
    y = build.op("aten.silu.default", build.x)
    out = build.op("aten.einsum.default", equation, [build.x, y])
    before = build.program(
        build.op("aten.mul.Tensor", build.x, build.op("aten.sum.default", build.op("aten.square.default", out)))
    )
    after, ctx = apply(before, DecomposeAttention(), config=_INT8)
    assert_same_function(before, after, depth=4096)
    assert count_ops(after)["aten.matmul.default"] == 1 and ctx.stats["decompose_attention"]["decomposed"] == 1


@pytest.mark.parametrize(
    "equation",
    ["bhij,bhij->bhij", "bhij,bhjk->bh", "bhii,bhik->bhk", "bhik,bhjk", "...ik,...jk->...ij", "bhik,bhjl->bhijkl"],
)
def test_other_einsums_stay(equation):
    build = GraphBuilder(x=(2, 4, 4))
    out = build.op("aten.einsum.default", equation, [build.x, build.x])
    before = build.program(build.op("aten.mul.Tensor", build.x, build.op("aten.mean.default", out)))
    after, _ = apply(before, DecomposeAttention(), config=_INT8)
    assert_same_function(before, after, depth=0)
    assert count_ops(after)["aten.einsum.default"] == 1


def test_rule_3_bmm_becomes_matmul():
    build = GraphBuilder(x=(5, 5))
    before = build.program(build.op("aten.bmm.default", build.x, build.op("aten.silu.default", build.x)))
    after, _ = apply(before, DecomposeAttention(), config=_INT8)
    assert_same_function(before, after)
    assert "aten.bmm.default" not in count_ops(after) and count_ops(after)["aten.matmul.default"] == 1


def test_float_attention_keeps_the_library_kernel():
    build = GraphBuilder(x=(2, 5, 4))
    before = build.program(build.op("aten.scaled_dot_product_attention.default", *_operands(build)))
    after, ctx = apply(before, DecomposeAttention())
    assert count_ops(after) == count_ops(before) and ctx.stats["decompose_attention"]["changed"] is False
