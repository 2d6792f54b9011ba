"""Networks that are legal and unusual: names, zeros, few bits, a fixed batch, float convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edadm_compile.config import QuantConfig
from edadm_compile.driver import export
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.export.convert import Exported, convert
from edadm_compile.export.operators import layers
from edadm_compile.export.targets import target
from edadm_compile.ir.program import SamplerSpec, layer_of
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, write
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


@pytest.mark.parametrize("int4", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_networks_of_few_bits_are_written(tmp_path, bits, int4):
    module = Chain(("stem", "mid", "head"))
    module.stem, module.mid = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
    compile_network(module, tmp_path / "a.qmod", bits, bits)
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx", int4=int4)
    rows = {r["layer"]: r for r in report["check"]["layers"]}
    assert {name: r["weights"] for name, r in rows.items()} == {"stem": 8, "mid": bits, "head": 8}
    assert rows["mid"]["operators"] == ["QLinearConv"] and rows["mid"]["error"] <= 1
    assert report["weights"]["layers"] == ({"int4": 1, "int8": 2} if int4 else {"int4": 0, "int8": 3})
    assert report["weights"]["float32_bytes"] == 4 * (3 * 4 * 9 + 4 * 16 + 16 * 3 * 9)
    graph = onnx.load(tmp_path / "a.onnx").graph
    stored = {t.name: onnx.numpy_helper.to_array(t).astype(int) for t in graph.initializer}
    assert abs(stored["mid.weight_q"]).max() <= (8 if int4 else 127)  # two to a byte, whatever they are multiplied by


@pytest.mark.parametrize(("bits", "finer"), [(2, True), (3, True), (8, False)])
def test_units_of_a_bias_are_finer_only_where_they_are_coarse(tmp_path, monkeypatch, bits, finer):
    """For few bits the weights in the file are the program's, to the last digit, in codes that are larger by a power of two."""
    module = Chain(("stem", "mid", "head"))
    module.stem, module.mid = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 16, 1)
    compile_network(module, tmp_path / "a.qmod", bits, bits)
    qdq = read(tmp_path / "a.qmod").qdq
    found = middle_weights(convert(qdq, target("cpu")))
    monkeypatch.setattr(layers, "fine_units", lambda s, node, codes, scale: (None, scale))
    before = middle_weights(convert(qdq, target("cpu")))
    factors = before[1] / found[1]
    assert bool((factors > 1).any()) == finer and np.array_equal(np.exp2(np.round(np.log2(factors))), factors)
    assert np.array_equal(found[0], before[0] * factors[:, None, None, None])
    if finer:  # as fine as bytes allow, or as is needed: an eighth of a code is what a bias is wrong by
        largest = abs(found[0]).max(axis=(1, 2, 3))
        assert ((largest > 63) | (found[2] <= 0.25)).all() and (before[2] > 0.25).any() and largest.max() <= 127


def middle_weights(exported: Exported) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales of the layer `mid`, and its unit ``s_x s_w`` in output codes."""
    constants = {name: v.const_value.numpy() for name, v in exported.model.graph.initializers.items()}
    quantizer = next(n for n in exported.model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "mid")
    unit = constants["mid.bias_scale"] / constants[quantizer.inputs[1].name]
    return constants["mid.weight_q"].astype(float), constants["mid.weight_scale"].astype(float), unit


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
    config = QuantConfig(8, 8, **{**QUICK, "method": "default", "deploy": "onnxruntime"})
    result = compile_source(source_of(make("asymmetric_pad"), steps=2), config, quality=False)
    write(to_artifact(result), tmp_path / "a.qmod")
    report = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx", onnx_target=consumer, check=False)
    quantized = [i for n in result.qdq.graph_module.graph.nodes if (i := layer_of(n)) and i.weight_bits < 32]
    assert "body.up" in {i.name for i in quantized}  # four convolutions for x86
    assert report["weights"]["layers"] == {"int4": 0, "int8": len(quantized)}
