"""Published methods as settings of the same passes."""

import pytest
import torch

from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.ir.program import layer_of
from edadm_compile.ir.quantizers import QUANTIZE
from edadm_compile.methods import METHODS
from edadm_compile.pipeline import compile_source
from tests.graphs import TinyUNet, source_of


def compiled(method, **changes):
    settings = {
        "calib_samples": 16, "tdac": TdacConfig(trajectories=3),
        "reconstruction": ReconstructionConfig(iters=4, batch=8), "method": method, **changes,
    }  # fmt: skip
    return compile_source(source_of(TinyUNet(), steps=6), QuantConfig(6, 6, **settings))


@pytest.fixture(scope="module")
def results():
    return {method: compiled(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_each_gives_a_working_integer_program(results, method):
    result = results[method]
    assert result.quality is not None and result.quality.sqnr > 8
    assert all(
        layer_of(n) is None or layer_of(n).act_bits <= 16 or n.meta["layer"].note
        for n in result.qdq.graph_module.graph.nodes
    )


@pytest.mark.parametrize("method", METHODS)
def test_phases_of_reconstruction(results, method):
    units = results[method].stats["reconstruct"]["units"]
    phases = [unit["phase"] for unit in units]
    assert list(dict.fromkeys(phases)) == list(METHODS[method].phases)
    assert len(units) % max(1, len(METHODS[method].phases)) == 0


def zero_points(result):
    """(zero points, lowest codes) of the activation quantizers that are not 16 bits wide."""
    module = result.qdq.graph_module
    found = [n for n in module.graph.nodes if n.target is not None and str(n.target) == QUANTIZE and n.args[3] < 16]
    assert found
    return [(float(module.get_buffer(str(n.args[2].target))), int(n.args[3])) for n in found]


def test_symmetric_codes_have_their_zero_in_the_middle_or_at_an_end(results):
    for zero, bits in zero_points(results["eda-dm"]):
        assert zero in (0.0, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    assert any(
        zero not in (0.0, -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) for zero, bits in zero_points(results["default"])
    )


def time_layers(result):
    infos = [layer_of(n) for n in result.qdq.graph_module.graph.nodes]
    return [i for i in infos if i is not None and i.name.startswith("time.") and i.weight_bits < 32]


def test_the_time_path_is_folded_or_quantized(results):
    """The layers called time.0 and time.2."""
    for method, settings in METHODS.items():
        folded = results[method].qdq.time is not None and "time_0" in results[method].qdq.time.tables
        assert folded == settings.time_tables, method
        assert bool(time_layers(results[method])) == (not settings.time_tables), method


def test_split_shortcuts(results):
    counts = {method: results[method].stats["split_concat"]["split_layers"] for method in METHODS}
    assert {method: count > 0 for method, count in counts.items()} == {m: s.split for m, s in METHODS.items()}
    assert compiled("default", split=False).stats["split_concat"]["split_layers"] == 0


def test_only_the_default_widens_edges(results):
    for method in METHODS:
        stem = next(i for n in results[method].qdq.graph_module.graph.nodes if (i := layer_of(n)) and i.role == "stem")
        assert stem.act_bits == (16 if method == "default" else 8)


def test_selections_spread_the_samples_differently():
    allocations = {
        name: compiled("minmax", selection=name, calib_samples=24).allocation
        for name in ("tdac", "density", "diversity", "uniform", "normal")
    }
    assert all(sum(counts) == 24 for counts in allocations.values())
    assert set(allocations["uniform"]) == {4} and len({tuple(a) for a in allocations.values()}) >= 4
    normal = allocations["normal"]  # step 0 is the noisiest; the peak is at 40 % of the schedule
    assert max(normal) in (normal[3], normal[4]) and normal[0] < max(normal)


def test_the_block_loss_can_be_left_out():
    results = [
        compiled("eda-dm", reconstruction=ReconstructionConfig(iters=4, batch=8, qdrop=0.0, block_loss_weight=weight))
        for weight in (1.0, 0.0)
    ]
    losses = [[unit["after"] for unit in r.stats["reconstruct"]["units"]] for r in results]
    assert losses[0] != losses[1]
    assert all(torch.isfinite(torch.tensor(values)).all() for values in losses)
