import pytest

from edadm_compile.ir.analysis import is_layer
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.passes.split_concat import SplitConcat
from tests.graphs import GraphBuilder, apply, assert_same_function, count_ops


def _split(program):
    after, ctx = apply(program, SplitConcat())
    assert_same_function(program, after)
    names = [layer_name(n) for n in after.graph_module.graph.nodes if is_layer(n)]
    return after, names, ctx.stats["split_concat"]["split_layers"]


@pytest.mark.parametrize("operator", ["aten.cat.default", "aten.concat.default"])
@pytest.mark.parametrize("dim", [1, -3])
def test_rule_1_convolutions(operator, dim):
    build = GraphBuilder(x=(4, 5, 5))
    other = build.op("aten.slice.Tensor", build.op("aten.neg.default", build.x), 1, 0, 3)
    out = build.conv("merge", build.op(operator, [other, build.x, other], dim), 10, 6)
    after, names, count = _split(build.program(out))
    assert names == ["merge.part0", "merge.part1", "merge.part2"] and count == 1
    assert operator not in count_ops(after)
    convs = [n for n in after.graph_module.graph.nodes if is_layer(n)]
    assert [n.args[2] is not None for n in convs] == [True, False, False]  # the bias is added once
    assert all(n.meta["split_of"] for n in convs)


def test_rule_2_linears():
    build = GraphBuilder(x=(7, 4))
    cat = build.op("aten.cat.default", [build.x, build.op("aten.silu.default", build.x)], -1)
    _, names, count = _split(build.program(build.linear("merge", cat, 8, 3)))
    assert names == ["merge.part0", "merge.part1"] and count == 1


def test_several_readers_are_all_split():
    build = GraphBuilder(x=(4, 5, 5))
    cat = build.op("aten.cat.default", [build.x, build.op("aten.silu.default", build.x)], 1)
    both = build.op("aten.add.Tensor", build.conv("a", cat, 8, 4), build.conv("b", cat, 8, 4))
    _, names, count = _split(build.program(both))
    assert count == 2 and sorted(names) == ["a.part0", "a.part1", "b.part0", "b.part1"]


def test_a_norm_in_between_blocks_the_split():
    build = GraphBuilder(x=(4, 5, 5))
    cat = build.op("aten.cat.default", [build.x, build.x], 1)
    _, names, count = _split(build.program(build.conv("a", build.op("aten.group_norm.default", cat, 2), 8, 4)))
    assert (names, count) == (["a"], 0)


def test_grouped_convolutions_and_other_dimensions_are_left_alone():
    build = GraphBuilder(x=(4, 5, 5))
    cat = build.op("aten.cat.default", [build.x, build.x], 1)
    weight = build.constant("g.weight", build.random(4, 4, 1, 1))
    grouped = build.op("aten.conv2d.default", cat, weight, None, [1, 1], [0, 0], [1, 1], 2)
    tall = build.conv("tall", build.op("aten.cat.default", [build.x, build.x], 2), 4, 4)
    out = build.op("aten.add.Tensor", grouped, build.op("aten.slice.Tensor", tall, 2, 0, 5))
    after, names, count = _split(build.program(out))
    assert count == 0 and names == ["g", "tall"] and count_ops(after)["aten.cat.default"] == 2


def test_a_concatenation_that_others_read_survives():
    build = GraphBuilder(x=(4, 5, 5))
    cat = build.op("aten.cat.default", [build.x, build.x], 1)
    out = build.op("aten.cat.default", [build.conv("a", cat, 8, 4), cat], 1)
    after, _, count = _split(build.program(out))
    assert count == 1 and count_ops(after)["aten.cat.default"] == 2
