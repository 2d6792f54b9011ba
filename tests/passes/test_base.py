from dataclasses import dataclass, field, replace

import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.errors import DialectError
from edadm_compile.passes.base import Context, PassResult, Silent, finish, run_passes
from edadm_compile.pipeline import float_passes, quant_passes
from tests.graphs import GraphBuilder, nodes_of


def _program():
    build = GraphBuilder()
    return build.program(build.op("aten.silu.default", build.conv("c", build.x, 4, 4)))


@dataclass(frozen=True)
class _Rename:
    """Replaces silu by another operator, in place."""

    operator: str = "aten.relu.default"
    name: str = "rename"
    reads: str = "float"
    writes: str = "float"
    seen: list = field(default_factory=list)

    def run(self, program, ctx):
        self.seen.append(program)
        for node in nodes_of(program, "aten.silu.default"):
            node.target = getattr(torch.ops.aten, self.operator.split(".")[1]).default
        return PassResult(finish(program), True, {"renamed": 1})


def test_passes_work_on_a_private_copy():
    program = _program()
    before = str(program.graph_module.graph)
    step = _Rename()
    result = run_passes(program, [step], Context(QuantConfig()))
    assert str(program.graph_module.graph) == before and nodes_of(program, "aten.silu.default")
    assert nodes_of(result, "aten.relu.default") and step.seen[0] is not program
    assert step.seen[0].graph_module is not program.graph_module


def test_every_pass_is_verified():
    with pytest.raises(DialectError, match=r"aten\.rand_like"):
        run_passes(_program(), [_Rename("aten.rand_like.default")], Context(QuantConfig()))


def test_a_pass_that_breaks_the_graph_stops_the_pipeline():
    later = _Rename(name="later")
    with pytest.raises(DialectError):
        run_passes(_program(), [_Rename("aten.rand_like.default"), later], Context(QuantConfig()))
    assert not later.seen


def test_wrong_dialects_are_refused():
    with pytest.raises(DialectError, match="pass rename reads dialect qdq, got float"):
        run_passes(_program(), [_Rename(reads="qdq")], Context(QuantConfig()))
    with pytest.raises(DialectError, match="pass rename writes dialect lowered, got float"):
        run_passes(_program(), [_Rename(writes="lowered")], Context(QuantConfig()))


def test_results_are_kept_and_dumped():
    ctx, dumped = Context(QuantConfig()), []
    run_passes(
        _program(),
        [_Rename(), _Rename(name="again")],
        ctx,
        lambda name, program: dumped.append((name, program.dialect)),
    )
    assert dumped == [("rename", "float"), ("again", "float")]
    assert (
        ctx.stats["rename"]["renamed"] == 1
        and ctx.stats["rename"]["changed"] is True
        and ctx.stats["rename"]["seconds"] >= 0
    )


def test_random_numbers_of_different_purposes_are_independent():
    ctx = Context(QuantConfig(seed=3))
    draws = [torch.rand(4, generator=ctx.generator(salt)).tolist() for salt in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1]
    other = torch.rand(4, generator=Context(QuantConfig(seed=4)).generator(1)).tolist()
    assert other != draws[0]


def test_dead_nodes_go_and_inputs_stay():
    build = GraphBuilder(unused=(3,))
    build.op("aten.neg.default", build.x)
    program = finish(build.program(build.op("aten.silu.default", build.x)))
    assert [n.op for n in program.graph_module.graph.nodes] == ["placeholder"] * 3 + ["call_function", "output"]


def test_the_pipeline_is_well_typed():
    passes = [*float_passes(), *quant_passes()]
    dialect = "float"
    for item in passes:
        assert item.reads == dialect and item.run.__doc__ and type(item).__doc__
        dialect = item.writes
    assert dialect == "lowered" and len({p.name for p in passes}) == len(passes)
    assert all(replace(item) == item for item in passes)  # frozen values


def test_silence_is_accepted():
    Silent().stage("a", None)
    Silent().advance(3, "b")
