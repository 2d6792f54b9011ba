"""What is written for each consumer, and INT4 constants."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.driver.export_check import Check
from edadm_compile.errors import ExportError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.export.convert import OUTPUT, convert
from edadm_compile.export.targets import TARGETS, target
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.graphs import TinyUNet, source_of
from tests.lowering.plans import QUICK, inputs_of


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    config = QuantConfig(4, 8, **{**QUICK, "method": "default"})
    return compile_source(source_of(TinyUNet(classes=5), num_classes={"label": 5}), config, quality=False)


def constants(exported) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in exported.model.graph.initializers.items()}


def activation_zero_points(exported) -> list[np.ndarray]:
    values = constants(exported)
    return [values[n.inputs[2].name] for n in exported.model.graph if n.op_type == "QuantizeLinear"]


@pytest.mark.parametrize(("name", "int4"), [*((name, False) for name in TARGETS), ("cpu", True), ("arm", True)])
def test_the_graph_is_standard_onnx(compiled, name, int4):
    proto = ir.to_proto(convert(compiled.qdq, target(name), int4=int4).model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert {n.domain for n in proto.graph.node} == {""}
    assert [o.name for o in proto.graph.output] == [OUTPUT]
    shape = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", 3, 8, 8]


def test_x86_gets_uint8_and_arm_int8_with_the_same_codes(compiled):
    x86, arm = (activation_zero_points(convert(compiled.qdq, target(n))) for n in ("cpu", "arm"))
    assert {z.dtype for z in x86} == {np.dtype(np.uint8)} and {z.dtype for z in arm} == {np.dtype(np.int8)}
    assert [z.astype(int).tolist() for z in x86] == [(z.astype(int) + 128).tolist() for z in arm]
    assert any(z.any() for z in arm)  # asymmetric


def test_tensorrt_gets_symmetric_codes_and_float_outputs(compiled):
    exported = convert(compiled.qdq, target("tensorrt"))
    zeros = activation_zero_points(exported)
    assert {z.dtype for z in zeros} == {np.dtype(np.int8)} and not any(z.any() for z in zeros)
    x86 = convert(compiled.qdq, target("cpu"))
    assert len(zeros) < len(activation_zero_points(x86))  # no rounding of convolution outputs
    kinds, x86_kinds = ({n.op_type for n in e.model.graph} for e in (exported, x86))
    assert "Floor" in x86_kinds - kinds  # no two terms of 16-bit codes
    inputs = inputs_of(compiled.lowered, 3)
    assert sqnr(compiled.lowered(*inputs), OnnxRuntimeEngine(exported)(*inputs)) > 15


def test_int4_constants_change_the_size_and_nothing_else(compiled):
    plain, small = (convert(compiled.qdq, target("cpu"), int4=v) for v in (False, True))
    for exported, wanted in ((plain, "INT8"), (small, "INT4")):
        stored = exported.model.graph.initializers
        for layer in exported.layers:
            if layer.info.weight_bits <= 8 and (w := stored.get(f"{layer.info.name}.weight_q")) is not None:
                expected = wanted if layer.info.weight_bits <= 4 else "INT8"
                assert w.const_value.dtype.name == expected, layer.info.name
    inputs = inputs_of(compiled.lowered, 4)
    assert torch.equal(OnnxRuntimeEngine(plain, 1)(*inputs), OnnxRuntimeEngine(small, 1)(*inputs))
    rows = Check(small, compiled.lowered, inputs).run()["layers"]
    assert all(r["integer"] for r in rows if r["weights"] == 4) and any(r["weights"] == 4 for r in rows)


def test_unknown_consumers_are_refused():
    with pytest.raises(ExportError, match="--onnx-target: got 'gpu', allowed cpu, arm, tensorrt"):
        target("gpu")
