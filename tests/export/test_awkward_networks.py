"""Networks that are legal and unusual: names, zeros, few bits, a fixed batch, float convolutions."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from edadm_compile.config import QuantConfig
from edadm_compile.driver import export
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.ir.program import SamplerSpec, layer_of
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import write
from tests.graphs import DDIM, source_of
from tests.lowering.plans import QUICK
from tests.models.variants import make


def opened(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "names",
    [("stem", "stem_2", "stem_2_2"), ("batch", "timesteps", "head"), ("x", "t", "timesteps_known"),
     ("stem", "out_sample", "head"), ("stem", "mid", "out_sample")],
)  # fmt: skip
def test_layers_may_be_called_like_anything_else_in_the_graph(names, tmp_path):
    compile_network(Chain(names), tmp_path / "a.qmod")
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")
    assert report["check"]["broken"] == []
    assert [r["layer"] for r in report["check"]["layers"] if r["integer"]] == list(names)
    assert report["weights"]["layers"] == {"int4": 0, "int8": 3}
    assert [o.name for o in opened(tmp_path / "a.onnx").get_outputs()] == ["out_sample"]


class Chain(nn.Module):
    """Three convolutions with names."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        for name, inner, outer in zip(names, (3, 16, 16), (16, 16, 3), strict=True):
            self.add_module(name, nn.Conv2d(inner, outer, 3, padding=1))

    def forward(self, x, t):
        for name in self.names:
            x = torch.tanh(getattr(self, name)(x))
        return x


class Untrained(nn.Module):
    """Two convolutions that start as zeros, as diffusion networks have them, with equal scales for unequal codes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        for layer in (self.wide, self.narrow):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t):
        h = torch.tanh(self.stem(x))
        h = torch.tanh(h + self.wide(h))
        return self.head(h + self.narrow(h))


def compile_network(module: nn.Module, output: Path, weights: int = 8, activations: int = 8) -> None:
    torch.manual_seed(0)
    config = QuantConfig(weights, activations, **QUICK)
    compile_model(module.eval(), config, sampler=SamplerSpec(DDIM, 3), output=output, shape=(3, 8, 8))


def test_layers_of_zeros_have_a_size_too(tmp_path):
    compile_network(Untrained(), tmp_path / "a.qmod")
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")
    assert report["weights"]["layers"] == {"int4": 0, "int8": 4} and report["check"]["broken"] == []


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_networks_of_few_bits_are_written(tmp_path, bits):
    module = Chain(("stem", "mid", "head"))
    module.stem, module.mid = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
    compile_network(module, tmp_path / "a.qmod", bits, bits)
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")
    assert {r["layer"]: r["weights"] for r in report["check"]["layers"]} == {"stem": 8, "mid": bits, "head": 8}


def test_a_fixed_batch_is_noted(tmp_path):
    result = compile_source(source_of(make("len_of_batch"), steps=2), QuantConfig(**QUICK), quality=False)
    write(to_artifact(result), tmp_path / "a.qmod")
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")
    assert report["notes"] == ["the model was captured for batches of 2 only"] and report["check"]["broken"] == []
    assert [i.shape for i in opened(tmp_path / "a.onnx").get_inputs()] == [[2, 3, 8, 8], ["steps"]]


@pytest.mark.parametrize("name", ["constant_planes", "autocast"])
def test_float_layers_are_listed_with_the_operator_that_runs(name, tmp_path):
    result = compile_source(source_of(make(name), steps=2), QuantConfig(**QUICK), quality=False)
    write(to_artifact(result), tmp_path / "a.qmod")
    rows = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")["check"]["layers"]
    (row,) = (r for r in rows if not r["integer"])
    assert row["why"] and row["operators"] == ["Conv"]


@pytest.mark.parametrize("consumer", ["cpu", "tensorrt"])
def test_every_quantized_layer_is_counted_once(consumer, tmp_path):
    config = QuantConfig(8, 8, **{**QUICK, "method": "eda-dm", "deploy": "onnxruntime"})
    result = compile_source(source_of(make("asymmetric_pad"), steps=2), config, quality=False)
    write(to_artifact(result), tmp_path / "a.qmod")
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx", onnx_target=consumer, check=False)
    quantized = [i for n in result.qdq.graph_module.graph.nodes if (i := layer_of(n)) and i.weight_bits < 32]
    assert "body.up" in {i.name for i in quantized}  # four convolutions for x86
    assert report["weights"]["layers"] == {"int4": 0, "int8": len(quantized)}
