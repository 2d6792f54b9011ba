"""The same network for each consumer, value by value, and what INT4 constants and the origin are in the file."""

from __future__ import annotations

import functools
import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import edadm_compile
from edadm_compile.config import QuantConfig
from edadm_compile.driver import export as driver
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.export_check import Check
from edadm_compile.export.convert import Exported, convert
from edadm_compile.export.targets import target
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.ir.quantizers import QUANTIZE
from edadm_compile.pipeline import CompileResult, compile_source
from edadm_compile.quant.packing import unpack
from edadm_compile.runtime.artifact import write
from edadm_compile.runtime.sampler_json import sampler_to_json
from tests.export.onnx_graphs import run_onnx
from tests.graphs import TinyUNet, nodes_of, source_of
from tests.lowering.plans import QUICK, inputs_of
from tests.models import foreign
from tests.models.variants import make

TARGETS = ("cpu", "arm", "tensorrt")
CASES = [("tiny", None), ("tiny", "onnxruntime"), ("labels", None), ("labels", "onnxruntime"), ("grouped", None),
         ("asymmetric_pad", None), ("asymmetric_pad", "onnxruntime")]  # fmt: skip


class Wide(nn.Module):
    """As wide as the digits network: 64 channels in every layer but the first and last."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 3, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1)) for _ in range(6)))
        self.mix = nn.Linear(64, 64)

    def forward(self, x, t):
        h = self.body(self.stem(x))
        return self.head(h + self.mix(h.mean(dim=(2, 3)))[:, :, None, None])


@functools.cache
def compiled(name: str, deploy: str | None) -> CompileResult:
    torch.manual_seed(0)
    if name == "tiny":
        source = source_of(TinyUNet(classes=5), num_classes={"label": 5})
    elif name == "labels":
        source = source_of(foreign.build_with_labels(), (3, foreign.SIZE, foreign.SIZE), 2, num_classes={"y": 4})
    elif name == "wide":
        source = source_of(Wide().eval(), (3, 4, 4), 2)
    else:
        source = source_of(make(name), (3, 8, 8), 2)
    settings = {**QUICK, "method": "default", "attention": "int8", "deploy": deploy}
    return compile_source(source, QuantConfig(4, 8, **settings), quality=False)


@pytest.mark.parametrize("consumer", TARGETS)
@pytest.mark.parametrize(("name", "deploy"), CASES)
def test_every_consumer_gets_what_the_program_computes(name, deploy, consumer):
    result = compiled(name, deploy)
    found = Check(convert(result.qdq, target(consumer)), result.lowered, inputs_of(result.lowered, 4)).run()
    rows = [row for row in found["layers"] if row["weights"] < 32]
    assert found["broken"] == [] and len(rows) > 5
    wide = [i.name for n in result.qdq.graph_module.graph.nodes if (i := layer_of(n)) and i.act_bits == 16]
    # An input of 16 bits stays float for TensorRT, and with it the layer.
    assert [row["layer"] for row in rows if row["error"] is None] == (wide if consumer == "tensorrt" else [])
    # 16-bit positions are themselves rounded; where codes go from layer to layer, or stay float, nothing is compared
    compared = [row["input_error"] for row in rows if row["input_error"] is not None]
    assert len(compared) >= len(rows) / 2 and max(compared) <= 0.51


@pytest.mark.parametrize(("name", "deploy"), [("tiny", None), ("labels", None)])
def test_symmetric_codes_reach_as_far_as_the_asymmetric_ones(name, deploy):
    before = compiled(name, deploy).qdq
    after = convert(before, target("tensorrt")).prepared
    assert any(zero for *_, zero in code_ranges(before)) and not any(zero for *_, zero in code_ranges(after))
    wanted = sorted({max(-low, high) for low, high, _ in code_ranges(before)})
    found = sorted({high for _, high, _ in code_ranges(after)})
    assert len(found) > 8
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("name", ["tiny", "asymmetric_pad", "labels"])
def test_consumers_without_output_codes_get_no_rounding_of_outputs(name):
    """The scales of the outputs' channels are no codes that TensorRT knows."""
    result = compiled(name, "onnxruntime")
    before, after = (p.graph_module for p in (result.qdq, convert(result.qdq, target("tensorrt")).prepared))
    sizes = [
        [get_constant(m, str(n.args[1].target)).numel() for n in m.graph.nodes if op_name(n.target) == QUANTIZE]
        for m in (before, after)
    ]
    assert max(sizes[0]) > 1 and set(sizes[1]) == {1}


def code_ranges(program: Program) -> list[tuple[float, float, float]]:
    """(value of the lowest 8-bit code, of the highest, zero point) of every quantizer and channel."""
    rows = []
    for node in nodes_of(program, "edadm.quantize.default"):
        if node.args[3] == 8:
            scales, zeros = (get_constant(program.graph_module, str(a.target)).reshape(-1) for a in node.args[1:3])
            rows += [((-128 - z) * s, (127 - z) * s, z) for s, z in zip(scales.tolist(), zeros.tolist(), strict=True)]
    return rows


def stored_weights(graph: Exported) -> dict[str, ir.Value]:
    """Constants of weight codes by layer (and phase)."""
    ending = ".weight_q"
    return {n.removesuffix(ending): v for n, v in graph.model.graph.initializers.items() if n.endswith(ending)}


@pytest.mark.parametrize(("name", "deploy"), [("asymmetric_pad", "onnxruntime"), ("wide", None)])
def test_int4_constants_hold_the_codes_two_to_a_byte(name, deploy):
    result = compiled(name, deploy)
    plain, small = (convert(result.qdq, target("cpu"), int4=value) for value in (False, True))
    kinds = set()
    codes, packed = stored_weights(plain), stored_weights(small)
    assert codes.keys() == packed.keys()
    narrow = {layer.info.name for layer in small.layers if layer.info.weight_bits <= 4}
    for layer, value in codes.items():
        kind = "INT4" if layer.split(".phase")[0] in narrow else "INT8"
        kinds.add(kind)
        found = packed[layer].const_value
        assert (value.const_value.dtype.name, found.dtype.name) == ("INT8", kind)
        assert found.nbytes == (found.size + 1) // 2 if kind == "INT4" else found.size
        assert np.array_equal(found.numpy().astype(np.int8), value.const_value.numpy())
    assert kinds == {"INT4", "INT8"}
    inputs = inputs_of(result.lowered, 3)
    assert torch.equal(*(run_onnx(ir.to_proto(graph.model), inputs)[0] for graph in (plain, small)))


@pytest.mark.parametrize("int4", [False, True])
def test_products_store_the_codes_of_the_program_transposed(int4):
    result = compiled("wide", None)
    found = stored_weights(convert(result.qdq, target("cpu"), int4=int4))
    module = result.qdq.graph_module
    (linear,) = nodes_of(result.qdq, "aten.linear.default")
    w_q, _, bits, shape, _ = linear.args[1].args
    wanted = unpack(get_constant(module, str(w_q.target)), bits, shape)
    assert np.array_equal(found["mix"].const_value.numpy().astype(np.int8), wanted.t().numpy())
    (head,) = (n for n in nodes_of(result.qdq, "aten.conv2d.default") if layer_of(n).name == "head")
    w_q, _, bits, shape, _ = head.args[1].args
    taps = unpack(get_constant(module, str(w_q.target)), bits, shape).permute(1, 2, 3, 0)  # [I, kh, kw, O]
    assert np.array_equal(found["head"].const_value.numpy().astype(np.int8), taps.reshape(64, 27).numpy())


def test_int4_layers_of_a_wide_network_run_in_integers_and_the_file_is_small(tmp_path):
    write(to_artifact(compiled("wide", None)), tmp_path / "wide.qmod")
    sizes = {}
    for int4, limit in ((False, 0.27), (True, 0.16)):
        output = tmp_path / f"{int4}.onnx"
        report = driver.run(tmp_path / "wide.qmod", output, int4=int4)
        weights = report["weights"]
        assert weights["layers"] == ({"int4": 6, "int8": 3} if int4 else {"int4": 0, "int8": 9})
        parameters = 3 * 64 * 9 * 2 + 6 * 64 * 64 * 9 + 64 * 64
        assert weights["float32_bytes"] == 4 * parameters
        assert 1 / 8 < weights["ratio"] <= limit and weights["ratio"] == round(weights["bytes"] / (4 * parameters), 4)
        assert report["check"]["counts"] == {
            "conv2d": {"integer": 8, "float": 0}, "linear": {"integer": 1, "float": 0},
        }  # fmt: skip
        assert report["bytes"] == output.stat().st_size
        sizes[int4] = output.stat().st_size
    saved = 6 * 64 * 64 * 9 // 2  # for one small node more in each of six layers
    assert saved - 6 * 200 < sizes[False] - sizes[True] < saved


def test_the_file_says_where_it_comes_from(artifact, tmp_path):
    write(artifact, tmp_path / "a.qmod")
    for consumer in TARGETS:
        driver.run(tmp_path / "a.qmod", tmp_path / "a.onnx", onnx_target=consumer, check=False)
        model = onnx.load(tmp_path / "a.onnx")
        facts = {p.key: p.value for p in model.metadata_props}
        assert set(facts) == {f"edadm.{name}" for name in ("target", "output_scales", "sampler", "source")}
        assert facts["edadm.target"] == consumer
        assert json.loads(facts["edadm.sampler"]) == sampler_to_json(
            artifact.lowered.sampler, artifact.lowered.signature
        )
        assert (model.producer_name, model.producer_version) == ("edadm-compile", edadm_compile.__version__)
        ready = onnxruntime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
        assert ready.get_modelmeta().custom_metadata_map == facts
    write(to_artifact(compiled("tiny", "onnxruntime")), tmp_path / "b.qmod")
    driver.run(tmp_path / "b.qmod", tmp_path / "b.onnx", check=False)
    facts = {p.key: p.value for p in onnx.load(tmp_path / "b.onnx").metadata_props}
    assert facts["edadm.output_scales"] == "in the reconstruction"
