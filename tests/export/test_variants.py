"""Networks of few bits, what ONNX Runtime runs in integers, and that preparing a program changes no value."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from edadm_compile.config import QuantConfig
from edadm_compile.driver.export_check import Check
from edadm_compile.driver.export_probing import Probed
from edadm_compile.export.convert import OUTPUT, convert
from edadm_compile.export.prepare import prepare
from edadm_compile.export.targets import target
from edadm_compile.ir.execute import evaluate
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.pipeline import CompileResult, compile_source
from tests.export.onnx_graphs import run_onnx, session
from tests.export.test_networks import CASES, batch_of, compiled, exported
from tests.graphs import TinyUNet, source_of
from tests.lowering.plans import QUICK, inputs_of
from tests.models import foreign
from tests.models.variants import make

#: Codes of fewer bits, whose range is narrower than that of the type, and coarser units of the bias.
WIDTHS = [
    ("tiny", 4, 8, None), ("tiny", 6, 6, "onnxruntime"), ("labels", 4, 8, "onnxruntime"), ("labels", 4, 4, None),
    ("grouped", 6, 6, None), ("asymmetric_pad", 4, 4, "onnxruntime"), ("masked_attention", 4, 4, None),
]  # fmt: skip
#: Networks that have every form of a layer between them, and float layers.
FORMS = [
    ("labels", "deploy"), ("foreign", "int8 attention"), ("masked_attention", "int8 attention"), ("grouped", "deploy"),
    ("asymmetric_pad", "deploy"), ("autocast", "plain"), ("constant_planes", "plain"),
]  # fmt: skip
INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "QLinearMatMul"}
UINT8, INT8 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8
FLOAT = {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum"}


@functools.cache
def narrow(name: str, weights: int, activations: int, deploy: str | None) -> CompileResult:
    if name == "tiny":
        source = source_of(TinyUNet(classes=5), num_classes={"label": 5})
    elif name == "labels":
        source = source_of(foreign.build_with_labels(), (3, foreign.SIZE, foreign.SIZE), 2, num_classes={"y": 4})
    else:
        source = source_of(make(name), (3, 8, 8), 2)
    settings = {**QUICK, "method": "default", "attention": "int8", "deploy": deploy}
    return compile_source(source, QuantConfig(weights, activations, **settings), quality=False)


@pytest.mark.parametrize(("name", "weights", "activations", "deploy"), WIDTHS)
def test_narrow_codes_are_the_nearest_and_clipped(name, weights, activations, deploy):
    result = narrow(name, weights, activations, deploy)
    graph = convert(result.qdq, target("cpu"))
    for size in (1, 5):
        assert Check(graph, result.lowered, batch_of(result.lowered, size)).run()["broken"] == []
    clipped = [node for node in graph.model.graph if node.op_type == "Clip" and node.name.startswith("quantize")]
    assert bool(clipped) == (activations < 8)
    for node in clipped:
        ends = [int(v.const_value.numpy()) for v in node.inputs[1:]]
        assert ends == [128 - 2 ** (activations - 1), 127 + 2 ** (activations - 1)]


@pytest.mark.parametrize(("name", "setting"), FORMS, ids=lambda v: v)
def test_no_quantized_layer_is_left_in_float(name, setting, tmp_path):
    graph = exported(name, setting)
    session(ir.to_proto(graph.model), optimized=tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = {tensor.name: tensor.data_type for tensor in optimized.initializer}
    floats = [node for node in optimized.node if node.op_type in FLOAT]
    integers = [node for node in optimized.node if node.op_type in INTEGER]
    quantized = [layer for layer in graph.layers if layer.info.weight_bits < 32]
    unquantized = {name for layer in graph.layers if layer.info.weight_bits == 32 for name in layer.products}
    # The time path is in a branch, not here. ONNX Runtime appends to the names of nodes that it changes.
    assert [n.name for n in floats if n.name.split("/")[0].removesuffix("_nchwc") not in unquantized] == []
    assert len(integers) == sum(len(layer.products) for layer in quantized)
    for node in integers:
        places = (4, 5) if node.op_type == "MatMulIntegerToFloat" else (2, 5)  # of the operands' zero points
        assert [kinds[node.input[place]] for place in places] == [UINT8, INT8], node.name


@pytest.mark.parametrize(("name", "setting"), [("foreign", "plain"), ("masked_attention", "int8 attention")])
def test_reading_the_borders_changes_no_prediction(name, setting, tmp_path):
    graph = exported(name, setting)
    inputs = inputs_of(compiled(name, setting).lowered, 3)
    (plain,) = run_onnx(ir.to_proto(graph.model), inputs)
    assert torch.equal(torch.from_numpy(Probed(graph, tmp_path).run(inputs)[OUTPUT]), plain)


@pytest.mark.parametrize(("name", "setting"), CASES, ids=lambda v: v)
def test_preparing_moves_quantizers_and_changes_no_value(name, setting):
    """Without the rounding of outputs, which is the one rewrite for x86 that is not exact, unless the program has it."""
    result = compiled(name, setting)
    before = [layer_of(n) for n in result.qdq.graph_module.graph.nodes if layer_of(n)]
    consumer = target("cpu") if setting == "deploy" else dataclasses.replace(target("cpu"), output_codes=False)
    after = prepare(result.qdq, consumer)
    assert [layer_of(n) for n in after.graph_module.graph.nodes if layer_of(n)] == before
    inputs = inputs_of(result.lowered, 2)
    assert torch.equal(evaluated(after, inputs), evaluated(result.qdq, inputs))


def evaluated(program: Program, inputs: Sequence[Tensor]) -> Tensor:
    """A program on a batch."""
    module, values = program.graph_module, {}
    waiting = program.graph_inputs(inputs)
    with torch.no_grad():
        for node in module.graph.nodes:
            if op_name(node.target).startswith("aten.upsample_nearest2d"):
                codes = values[node.args[0]]  # torch has no kernel for int8 in every memory layout
                values[node] = evaluate(module, node, {**values, node.args[0]: codes.float()}).to(codes.dtype)
            else:
                values[node] = waiting.pop(0) if node.op == "placeholder" else evaluate(module, node, values)
    return values[node]
