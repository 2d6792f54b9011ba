"""What passes hold, and what they give back: values until their last reader, rooms before large values, free pages."""

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from edadm_compile.ir.analysis import last_read
from edadm_compile.passes import freed_memory, sensitivity
from edadm_compile.passes.float_outputs import FloatOutputs
from edadm_compile.passes.kept_values import KeptValues
from edadm_compile.passes.output_ranges import ChannelObserver
from edadm_compile.passes.sensitivity import output_error, values_of
from tests.graphs import GraphBuilder, apply, nodes_of, random_calibration, small_config


class _Watched(dict):
    """A dictionary that remembers how many values it held at most."""

    most = 0

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.most = max(self.most, len(self))


def _chain(length=12):
    """Convolutions one after the other; the first value is read once more at the end."""
    build = GraphBuilder()
    first = h = build.conv("first", build.x, 4, 4)
    for i in range(length):
        h = build.op("aten.silu.default", build.conv(f"c{i}", h, 4, 4))
    return build.program(build.op("aten.add.Tensor", h, first))


def test_a_node_is_last_read_by_its_last_reader_alone():
    program = _chain(1)
    graph = program.graph_module.graph
    found = last_read(graph.nodes)
    first, conv = nodes_of(program, "aten.conv2d.default")
    (total,) = nodes_of(program, "aten.add.Tensor")
    (silu,) = nodes_of(program, "aten.silu.default")
    assert found[silu] == [conv] and set(found[total]) == {first, silu}
    assert found[graph.output_node()] == [total]
    assert all(first not in sources for node, sources in found.items() if node is not total)


def test_changed_values_go_after_their_last_reader_and_the_error_is_that_of_the_whole_graph():
    program = _chain()
    inputs = random_calibration(program).inputs
    values = values_of(program, inputs)
    first = nodes_of(program, "aten.conv2d.default")[0]
    changed = _Watched({first: values[first] + 0.5})
    error = output_error(program, changed, values)
    assert changed.most <= 4  # the first value, what a node reads and writes: not the 26 behind it
    assert set(changed) == {program.graph_module.graph.output_node()}
    build = values[first] + 0.5
    h = build
    with torch.no_grad():
        for conv in nodes_of(program, "aten.conv2d.default")[1:]:
            weight, bias = (values[a] for a in conv.args[1:3])
            h = torch.nn.functional.silu(torch.nn.functional.conv2d(h, weight, bias, padding=1))
    exact = values[program.graph_module.graph.output_node()].double()
    assert error == pytest.approx(float(((h + build).double() - exact).square().sum()), rel=1e-6)


def test_output_codes_are_measured_in_pieces_where_the_values_are_too_large(monkeypatch):
    """With ranges that do not depend on a random sample, the errors are the same."""
    build = GraphBuilder()
    h = build.op("aten.tanh.default", build.conv("a", build.x, 4, 16))
    program = build.program(build.conv("head", build.conv("b", h, 16, 12), 12, 4))
    monkeypatch.setattr(ChannelObserver, "affine", lambda *a, **k: (torch.tensor([0.05]), torch.tensor([3.0])))
    calibration = random_calibration(program)

    def measured():
        stats = apply(program, FloatOutputs(), config=small_config(), calibration=calibration)[1].stats
        return stats["float_outputs"]["output_sensitivity"]

    whole = measured()
    monkeypatch.setattr(sensitivity, "MOST_BYTES", 1)
    rows = []
    original = sensitivity.values_of
    monkeypatch.setattr(
        "edadm_compile.passes.float_outputs.values_of", lambda p, x: rows.append(len(x[0])) or original(p, x)
    )
    assert measured() == pytest.approx(whole, rel=1e-5) and set(whole) == {"a", "b"}
    assert set(rows) == {1} and len(rows) > 2


def test_reserved_room_takes_the_values_and_grows_only_beyond_it():
    batches = [torch.randn(n, 3) for n in (4, 1, 5)]
    kept = KeptValues()
    kept.reserve(10, 3)
    places = set()
    for batch in batches:
        kept.add(batch)
        places.add(kept.values.data_ptr())
    assert len(places) == 1
    assert torch.equal(kept.values, torch.cat(batches))
    kept.add(batches[1])
    assert torch.equal(kept.values, torch.cat([*batches, batches[1]]))


def test_without_reserved_room_values_are_kept_too():
    kept = KeptValues()
    kept.add(torch.arange(3.0))
    kept.add(torch.arange(2.0))
    assert kept.values.tolist() == [0, 1, 2, 0, 1]


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_blocks_between_others_go_back_to_the_system():
    blocks, between = [], []
    for _ in range(1024):
        blocks.append(torch.zeros(16 << 10))  # 64 KiB: below the size that glibc takes from the system one by one
        between.append(torch.zeros(64))
    del blocks
    before = _resident()
    freed_memory.give_back()
    assert before - _resident() > 32 << 20
    assert len(between) == 1024


def test_other_c_libraries_have_no_such_call(monkeypatch):
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: object())
    freed_memory.give_back()
    monkeypatch.setattr(freed_memory.sys, "platform", "win32")
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda name: pytest.fail("loaded a library"))
    freed_memory.give_back()
