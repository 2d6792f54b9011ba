"""Ranges that are recorded are those of the values, and quantizer ends those of the codes."""

import pytest
import torch

from edadm_compile.evaluate.activation_ranges import LayerRange, RangeRecorder, quantizer_ranges, seen
from edadm_compile.ir.program import layer_of
from edadm_compile.passes.layer_roles import annotate
from tests.graphs import inputs_for, small_config


def test_a_range_has_extremes_and_quantiles_of_all_slices():
    found = LayerRange()
    found.add([seen(torch.arange(0.0, 51.0)), seen(torch.arange(50.0, 101.0))])
    found.add([seen(torch.tensor([2.0]))])
    assert (found.low, found.high) == ([0.0, 2.0], [100.0, 2.0])
    assert found.lower[0] == pytest.approx(1.0, abs=0.1) and found.upper[0] == pytest.approx(99.0, abs=0.1)


def test_large_activations_are_thinned_out_for_quantiles_only():
    values = torch.linspace(-1, 1, 200_001)
    values[12345] = 50.0
    found = LayerRange()
    found.add([seen(values)])
    assert found.high == [50.0] and found.upper[0] == pytest.approx(0.98, abs=0.01)


def test_the_recorder_predicts_as_the_program_and_counts_steps(labelled_program):
    program = labelled_program.fork()
    annotate(program, small_config())
    recorder = RangeRecorder(program)
    inputs = inputs_for(program)
    for _ in range(2):
        torch.testing.assert_close(recorder(*inputs), program(*inputs))
    roles = {i.name: i.role for n in program.graph_module.graph.nodes if (i := layer_of(n))}
    first = next(found for name, found in recorder.ranges.items() if roles[name] == "stem")
    assert first.low == [float(inputs[0].min())] * 2 and first.high == [float(inputs[0].max())] * 2
    assert {len(r.low) for r in recorder.ranges.values()} == {2}


def test_ends_of_a_quantizer_are_what_its_outer_codes_stand_for(artifact):
    found = quantizer_ranges(artifact.qdq)
    graph = artifact.qdq.graph_module.graph
    names = {i.name for n in graph.nodes if (i := layer_of(n)) and i.act_bits < 32}
    assert set(found) == names
    stem = next(n for n in graph.nodes if (i := layer_of(n)) and i.role == "stem")
    quantize = stem.args[0].args[0]
    scale = float(artifact.qdq.graph_module.get_buffer(str(quantize.args[1].target)))
    low, high = found[layer_of(stem).name]
    assert low == pytest.approx(-(2**15) * scale) and high == pytest.approx((127 * 256 + 127) * scale)  # 16 bits
