"""Convolutions of upsampled images in the ONNX graph, and the views that keep ONNX Runtime on its fast kernels."""

from collections import Counter

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from edadm_compile.config import QuantConfig
from edadm_compile.driver.export_check import Check
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.graphs import source_of
from tests.lowering.plans import QUICK, inputs_of


class Net(nn.Module):
    """Down, up by phases, and an addition that reads the upsampled image twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 16, 3, stride=2, padding=1)
        self.up = nn.Conv2d(16, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x, t):
        h = torch.tanh(self.stem(x))
        u = self.up(functional.interpolate(functional.silu(self.down(h)), scale_factor=2.0, mode="nearest"))
        return self.head(torch.tanh(self.mix(functional.silu(u)) + u))


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    config = QuantConfig(8, 8, **QUICK, deploy="onnxruntime")
    return compile_source(source_of(Net().eval(), (3, 8, 12), 2), config, quality=False)


def operators(exported):
    return Counter(node.op_type for node in exported.model.graph)


@pytest.mark.parametrize("name", ["cpu", "arm"])
def test_each_phase_is_a_convolution_of_the_small_image(compiled, name):
    exported = convert(compiled.qdq, target(name))
    convolutions = {n.name: n for n in exported.model.graph if n.op_type == "Conv"}
    phases = [convolutions[f"up.phase{i}"] for i in range(4)]
    pads = [tuple(n.attributes["pads"].as_ints()) for n in phases]
    assert pads == [(0, 0, 1, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 1, 0, 0)]
    (layer,) = [found for found in exported.layers if found.info.name == "up"]
    assert layer.products == tuple(n.name for n in phases) and layer.pixels is not None
    assert "Resize" not in operators(exported)


@pytest.mark.parametrize("name", ["cpu", "arm"])
def test_codes_of_the_image_are_those_of_the_reference_kernel(compiled, name):
    exported = convert(compiled.qdq, target(name))
    inputs = inputs_of(compiled.lowered, 5)
    found = Check(exported, compiled.lowered, inputs).run()
    assert found["broken"] == []
    (row,) = [r for r in found["layers"] if r["layer"] == "up"]
    assert row["output"] == "codes" and row["error"] <= 1
    if name == "cpu":
        assert row["operators"] == ["QLinearConv"] * 4 and row["integer"]
    assert sqnr(compiled.lowered(*inputs), OnnxRuntimeEngine(exported)(*inputs)) > 35


def test_a_phase_at_a_wrong_place_is_noticed(compiled, monkeypatch):
    from edadm_compile.export.operators import phases

    monkeypatch.setattr(phases, "PHASES", ((1, 0), (1, 1), (0, 1), (0, 0)))
    exported = convert(compiled.qdq, target("cpu"))
    found = Check(exported, compiled.lowered, inputs_of(compiled.lowered, 2)).run()
    assert len(found["broken"]) == 1 and "layer up" in found["broken"][0]


def test_weights_of_all_phases_are_stored_once(compiled):
    exported = convert(compiled.qdq, target("cpu"))
    stored = exported.model.graph.initializers
    assert [list(stored[f"up.phase{i}.weight_q"].shape) for i in range(4)] == [[12, 16, 2, 2]] * 4
    assert "up.weight_q" not in stored


def test_tensorrt_keeps_one_convolution_and_shuffles_floats(compiled):
    exported = convert(compiled.qdq, target("tensorrt"))
    names = {n.name for n in exported.model.graph if n.op_type == "Conv"}
    assert "up" in names and "up.phase0" not in names
    inputs = inputs_of(compiled.lowered, 3)
    # Symmetric activations are coarser; a pixel at a wrong place would leave nothing.
    assert sqnr(compiled.lowered(*inputs), OnnxRuntimeEngine(exported)(*inputs)) > 15


def test_a_dequantizer_that_is_read_more_than_once_stands_behind_a_view(compiled):
    exported = convert(compiled.qdq, target("cpu"))
    shared = []
    for node in exported.model.graph:
        uses = [usage.node.op_type for usage in node.outputs[0].uses()]
        if node.op_type == "DequantizeLinear":
            assert len(uses) == 1 or set(uses) == {"Conv"}, node.name  # an integer layer takes it in
        elif node.op_type == "Reshape" and node.inputs[0].producer().op_type == "DequantizeLinear" and len(uses) > 1:
            shared.append(sorted(uses))
    # behind `down` the activation function alone, behind `up` it and the addition
    assert shared == [["Mul", "Sigmoid"], ["Add", "Mul", "Sigmoid"]]


class Attention(nn.Module):
    """Two-head attention, whose products are quantized."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, t):
        h = torch.tanh(self.stem(x))
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(h + mixed.transpose(1, 2).unflatten(-1, h.shape[2:]))


@pytest.mark.parametrize("deploy", [None, "onnxruntime"])
def test_right_operands_of_attention_products_stay_int8(deploy):
    torch.manual_seed(0)
    config = QuantConfig(8, 8, **QUICK, deploy=deploy, attention="int8")
    result = compile_source(source_of(Attention().eval(), (3, 4, 4), 2), config, quality=False)
    exported = convert(result.qdq, target("cpu"))
    found = Check(exported, result.lowered, inputs_of(result.lowered, 3)).run()
    assert found["broken"] == [] and found["counts"]["matmul"] == {"integer": 2, "float": 0}
    kinds = {v.dtype for n in exported.model.graph for v in n.inputs if v is not None and v.dtype is not None}
    assert ir.DataType.INT8 in kinds
