import dataclasses

import pytest
import torch

from edadm_compile.errors import InputError
from edadm_compile.ir.program import TimeTables, get_constant, layers, placeholders, set_constant
from tests.graphs import GraphBuilder


def _program():
    build = GraphBuilder(x=(2, 3, 3))
    t = build.op("aten.reshape.default", build.op("aten._to_copy.default", build.t, dtype=torch.float32), [-1, 1, 1, 1])
    return build.program(build.op("aten.add.Tensor", build.conv("c", build.x, 2, 2), t))


def test_a_fork_has_its_own_graph_and_shares_tensors():
    program = _program()
    text = str(program.graph_module.graph)
    fork = program.fork()
    node = next(n for n in fork.graph_module.graph.nodes if str(n.target) == "aten.add.Tensor")
    node.target = torch.ops.aten.sub.Tensor
    node.meta["layer"] = "changed"
    set_constant(fork.graph_module, "c.weight", torch.zeros(2, 2, 3, 3))
    fork.graph_module.recompile()
    assert str(program.graph_module.graph) == text
    assert get_constant(program.graph_module, "c.weight").any()
    assert (
        get_constant(fork.graph_module, "c.bias").data_ptr() == get_constant(program.graph_module, "c.bias").data_ptr()
    )
    assert all(n.meta.get("layer") != "changed" for n in program.graph_module.graph.nodes)
    assert [i.name for i in layers(fork) if i != "changed"] == ["c"]


@pytest.mark.parametrize(("lowest", "largest"), [(1, 1024), (1, 3), (1, 1), (4, 4), (7, 7), (8, 8)])
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_batches_are_sliced_and_filled_up(batch, lowest, largest):
    program = _program()
    x, t = torch.randn(batch, 2, 3, 3), torch.arange(batch)
    expected = torch.cat([program(x[i : i + 1], t[i : i + 1]) for i in range(batch)])
    sizes = []
    limited = dataclasses.replace(
        program, signature=dataclasses.replace(program.signature, min_batch=lowest, max_batch=largest)
    )
    handle = limited.graph_module.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[0]))
    result = limited(x, t)
    handle.remove()
    assert result.shape == expected.shape and float((result - expected).abs().max()) <= 1e-5
    assert all(lowest <= s <= largest for s in sizes)


@pytest.mark.parametrize(("lowest", "largest", "rows", "sizes"), [
    (1, 1024, 3, [3, 3, 1]), (1, 1024, 100, [7]), (1, 2, 5, [2, 2, 2, 1]), (2, 1024, 3, [3, 3, 2]), (2, 1024, 1, [2, 2, 2, 2]),
    (4, 4, 2, [4, 4]),
])  # fmt: skip
def test_at_most_so_many_rows_run_together(lowest, largest, rows, sizes):
    program = _program()
    x, t = torch.randn(7, 2, 3, 3), torch.arange(7)
    expected = program(x, t)
    signature = dataclasses.replace(program.signature, min_batch=lowest, max_batch=largest)
    program = dataclasses.replace(program, signature=signature)
    seen = []
    program.graph_module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    torch.testing.assert_close(program.at_most(rows)(x, t), expected)
    assert seen == sizes and program.signature.max_batch == largest


def test_constants_live_under_dotted_names():
    module = torch.nn.Module()
    set_constant(module, "a.b.weight", torch.ones(2))
    set_constant(module, "a.b.weight", torch.zeros(3))
    assert get_constant(module, "a.b.weight").shape == (3,)
    with pytest.raises(AttributeError):
        get_constant(module, "a.c")


def _tables(**settings):
    rows = torch.tensor([[0.0, 10.0], [1.0, 20.0], [4.0, 40.0]])
    return TimeTables(torch.tensor([0.0, 10.0, 30.0], dtype=torch.float64), {"time_0": rows}, **settings)


def test_known_timesteps_read_their_row():
    for dtype in (torch.int64, torch.float32):
        found = _tables().lookup(torch.tensor([30, 0, 10], dtype=dtype))
        assert found["time_0"].tolist() == [[4.0, 40.0], [0.0, 0.0 + 10.0], [1.0, 20.0]]


def test_other_timesteps_interpolate_without_a_path():
    found = _tables().lookup(torch.tensor([5.0, 20.0, 30.0, 99.0, -3.0]))
    assert found["time_0"].tolist() == [[0.5, 15.0], [2.5, 30.0], [4.0, 40.0], [4.0, 40.0], [0.0, 10.0]]


def test_complete_tables_refuse_other_timesteps():
    with pytest.raises(InputError, match="timestep"):
        _tables(path_outputs=("time_0",)).lookup(torch.tensor([7]))


def test_inputs_are_followed_by_the_tables():
    build = GraphBuilder(x=(2, 3, 3))
    value = build.graph.placeholder("time_0")
    out = build.op("aten.add.Tensor", build.x, build.op("aten.reshape.default", value, [-1, 2, 1, 1]))
    program = build.program(out, time=_tables())
    assert placeholders(program.graph_module.graph) == ["x", "t", "time_0"]
    assert program(torch.zeros(2, 2, 3, 3), torch.tensor([10, 30]))[:, :, 0, 0].tolist() == [[1.0, 20.0], [4.0, 40.0]]
