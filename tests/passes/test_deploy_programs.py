"""Compiled programs for ONNX Runtime: the roundings of convolution outputs are in them, and in the reported quality."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edadm_compile.calibration import sampler
from edadm_compile.config import QuantConfig, ReconstructionConfig
from edadm_compile.driver.compile import to_artifact
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.evaluate.contract import check_layers
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import get_constant, layer_of, layers
from edadm_compile.passes.base import Context
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, write
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.graphs import TinyUNet, float_program, nodes_of, source_of
from tests.lowering.plans import QUICK, inputs_of

QUANTIZE, DEQUANTIZE = "edadm.quantize.default", "edadm.dequantize.default"


class Upsampled(nn.Module):
    """A convolution of an upsampled image between two others."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 10, 3, padding=1)
        self.head = nn.Conv2d(10, 3, 3, stride=2, padding=1)

    def forward(self, x, t):
        return self.head(torch.tanh(self.up(functional.interpolate(torch.tanh(self.stem(x)), scale_factor=2.0))))


MODELS = {
    "strict": (lambda: TinyUNet(width=12), {}),
    "sensitive": (lambda: TinyUNet(width=12), {"method": "default", "reconstruction": ReconstructionConfig(iters=4)}),
    "phases": (Upsampled, {"method": "default"}),
}


@pytest.fixture(scope="module")
def compiled():
    """Results by model and whether they are for ONNX Runtime, made when asked for."""
    made = {}

    def get(name, deploy=True):
        if (name, deploy) not in made:
            torch.manual_seed(0)
            module, changes = MODELS[name][0](), MODELS[name][1]
            config = QuantConfig(**{**QUICK, "weight_bits": 8, **changes, "deploy": "onnxruntime" if deploy else None})
            made[name, deploy] = compile_source(source_of(module, steps=2), config)
        return made[name, deploy]

    return get


def convolutions(program):
    return [n for n in program.graph_module.graph.nodes if (info := layer_of(n)) and info.kind.startswith("conv")]


@pytest.mark.parametrize("name", list(MODELS))
def test_pairs_stand_behind_the_convolutions_that_write_codes_and_nowhere_else(compiled, name):
    result = compiled(name)
    for program in (result.qdq, result.lowered):
        module, expected = program.graph_module, set()
        for node in convolutions(result.qdq):
            if not writes_codes(node, layer_of(node)):
                continue
            value = pixels_of(node)
            (quantizer,) = value.users
            assert str(quantizer.target) == QUANTIZE and quantizer.args[3:] == (8, False)
            scale, zero = (get_constant(result.qdq.graph_module, a.target) for a in quantizer.args[1:3])
            channels = node.args[1].args[3][0] // (4 if value is not node else 1)
            assert scale.shape == zero.shape == (channels, 1, 1)
            assert bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
            assert torch.equal(zero, zero.round()) and int(zero.min()) >= -128 and int(zero.max()) <= 127
            (pair,) = quantizer.users
            assert str(pair.target) == DEQUANTIZE and [a.target for a in pair.args[1:]] == [
                a.target for a in quantizer.args[1:3]
            ]
            expected.add(quantizer.args[1].target)
        wide = [n for n in nodes_of(program, QUANTIZE) if get_constant(module, n.args[1].target).dim() == 3]
        assert {n.args[1].target for n in wide} == expected and len(expected) > 1
    assert all(info.out_scale is None for info in layers(result.lowered))
    assert result.stats["insert_quant"]["output_quantizers"] == len(expected)


@pytest.mark.parametrize("name", ["strict", "sensitive"])
def test_without_deploy_the_records_have_what_the_export_needs(compiled, name):
    result = compiled(name, deploy=False)
    for program in (result.qdq, result.lowered):
        assert not [
            n for n in nodes_of(program, QUANTIZE) if get_constant(program.graph_module, n.args[1].target).dim() == 3
        ]
    coded = {layer_of(n).name: n for n in convolutions(result.qdq) if writes_codes(n, layer_of(n))}
    found = {info.name: info for info in layers(result.lowered) if info.out_scale is not None}
    assert set(found) == set(coded) and len(coded) > 5
    for label, node in coded.items():
        assert len(found[label].out_scale) == len(found[label].out_zero_point) == node.args[1].args[3][0]


def test_convolutions_in_other_forms_have_a_float_output(compiled):
    result = compiled("sensitive")
    free = {layer_of(n).name for n in convolutions(result.qdq) if not writes_codes(n, layer_of(n))}
    assert {"stem", "head"} < free and free - {"stem", "head"} == set(result.stats["float_outputs"]["float_outputs"])
    strict = compiled("strict")
    assert {layer_of(n).name for n in convolutions(strict.qdq) if not writes_codes(n, layer_of(n))} == {"head"}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_reference_engine_computes_the_simulation(compiled, name):
    """Equal to float rounding, except in images where a value lies on the border of two codes."""
    result, values = compiled(name), []
    for seed in range(4):
        inputs = inputs_of(result.lowered, 6, seed)
        with torch.no_grad():
            simulated, integers = result.qdq(*inputs), result.lowered(*inputs)
        values += [sqnr(a, b) for a, b in zip(simulated, integers, strict=True)]
    values.sort()
    assert values[len(values) // 4] > 115 and values[0] > 35
    assert not [r.failure for r in check_layers(result.qdq, result.lowered, inputs_of(result.lowered, 4)) if r.failure]


def evaluated(result, candidate):
    """The closing figure of a compilation, for another predictor than the lowered program."""
    program = float_program(source_of(TinyUNet(width=12), steps=2), result.config)
    x = sampler.draw_noise(program.signature, 16, Context(result.config).generator(3))
    return compare_noise(program, candidate, program.sampler, x, ()).sqnr


def without_output_codes(program):
    copy = program.fork()
    for node in nodes_of(copy, DEQUANTIZE):
        if get_constant(copy.graph_module, node.args[1].target).dim() == 3:
            node.replace_all_uses_with(node.args[0].args[0])
    copy.graph_module.recompile()
    return copy


def test_the_reported_quality_is_that_of_the_graph(compiled):
    deployed, plain = compiled("strict"), compiled("strict", deploy=False)
    assert evaluated(deployed, deployed.lowered) == pytest.approx(deployed.quality.sqnr, abs=1e-3)
    assert evaluated(deployed, without_output_codes(deployed.lowered)) > deployed.quality.sqnr + 3
    assert evaluated(deployed, OnnxRuntimeEngine(deployed.qdq)) == pytest.approx(deployed.quality.sqnr, abs=0.5)
    # Without deploy ONNX Runtime rounds what the reported figure does not know of.
    assert evaluated(plain, OnnxRuntimeEngine(plain.qdq)) < plain.quality.sqnr - 3


def test_onnx_runtime_is_closer_to_the_program_that_counts_its_roundings(compiled):
    for name in ("strict", "sensitive"):
        found = []
        for result in (compiled(name), compiled(name, deploy=False)):
            inputs = inputs_of(result.lowered, 8)
            with torch.no_grad():
                found.append(sqnr(result.lowered(*inputs), OnnxRuntimeEngine(result.qdq)(*inputs)))
        assert found[0] > found[1] + 5


@pytest.mark.parametrize("deploy", [True, False])
def test_the_file_keeps_pairs_and_records(compiled, tmp_path, deploy):
    result = compiled("sensitive", deploy)
    write(to_artifact(result), tmp_path / "a.qmod")
    loaded = read(tmp_path / "a.qmod")
    assert loaded.manifest["config"]["deploy"] == ("onnxruntime" if deploy else None)
    for program in (loaded.qdq, loaded.lowered):
        assert layers(program) == layers(result.lowered)
    assert any(info.float_output for info in layers(loaded.lowered))
    assert any(info.out_scale for info in layers(loaded.lowered)) is not deploy
    inputs = inputs_of(result.lowered, 3)
    with torch.no_grad():
        assert torch.equal(loaded.lowered(*inputs), result.lowered(*inputs))
