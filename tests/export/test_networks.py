"""Whole networks: what ONNX Runtime computes against the reference engine, layer by layer and end to end."""

from __future__ import annotations

import functools

import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.driver.export_check import Check
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.export.convert import Exported, convert
from edadm_compile.export.targets import target
from edadm_compile.ir.program import Program
from edadm_compile.pipeline import CompileResult, compile_source
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.graphs import source_of
from tests.lowering.plans import QUICK, inputs_of
from tests.models import foreign
from tests.models.variants import VARIANTS, make

SETTINGS = {"plain": {}, "deploy": {"deploy": "onnxruntime"}, "int8 attention": {"attention": "int8"}}
#: Networks on which each setting changes something, or where codes move in unusual ways.
FURTHER = [
    ("bmm_attention", "deploy"), ("bmm_attention", "int8 attention"), ("masked_attention", "int8 attention"),
    ("einsum_attention_in_own_checkpoint", "int8 attention"), ("grouped", "deploy"), ("pixel_shuffle", "deploy"),
    ("asymmetric_pad", "deploy"), ("foreign", "deploy"), ("foreign", "int8 attention"), ("labels", "deploy"),
]  # fmt: skip
CASES = [(name, "plain") for name in (*VARIANTS, "foreign", "labels")] + FURTHER


@functools.cache
def compiled(name: str, setting: str) -> CompileResult:
    config = QuantConfig(8, 8, **{**QUICK, "method": "default", **SETTINGS[setting]})
    if name == "labels":
        source = source_of(foreign.build_with_labels(), (3, foreign.SIZE, foreign.SIZE), 2, num_classes={"y": 4})
    elif name == "foreign":
        source = source_of(foreign.build(), (3, foreign.SIZE, foreign.SIZE), 2)
    else:
        source = source_of(make(name), (3, 8, 8), 2)
    return compile_source(source, config, quality=False)


def exported(name: str, setting: str) -> Exported:
    return convert(compiled(name, setting).qdq, target("cpu"))


def batch_of(program: Program, size: int) -> list[torch.Tensor]:
    fixed = program.signature.min_batch == program.signature.max_batch
    return inputs_of(program, program.signature.max_batch if fixed else size)


@pytest.mark.parametrize(("name", "setting"), CASES, ids=lambda v: v)
def test_every_layer_has_the_reference_kernels_result(name: str, setting: str) -> None:
    result = compiled(name, setting)
    found = Check(exported(name, setting), result.lowered, batch_of(result.lowered, 5)).run()
    assert found["broken"] == []
    rows = [r for r in found["layers"] if r["weights"] < 32]
    assert rows and all(r["error"] is not None for r in rows)
    inputs = [r["input_error"] for r in rows if r["input_error"] is not None]
    # In steps; half of one is rounding. A graph has float32 where the model has bfloat16, whose values have 8 bits.
    assert len(inputs) >= len(rows) / 2 and max(inputs) <= (1.0 if name == "autocast" else 0.51)
    # What has integer weights, or quantized operands, runs in integers; the reason why another layer is float is told.
    assert [r["layer"] for r in rows if not r["integer"]] == []
    assert all(r["why"] for r in found["layers"] if not r["integer"])


@pytest.mark.parametrize(("name", "setting"), CASES, ids=lambda v: v)
def test_the_prediction_is_as_far_from_the_float_model_as_rounding_explains(name: str, setting: str) -> None:
    result = compiled(name, setting)
    engine = OnnxRuntimeEngine(exported(name, setting), threads=2)
    for size in (1, 2, 5):
        inputs = batch_of(result.lowered, size)
        # Outputs are rounded once more, to 8 bits: 18.4 dB (one image) and more was measured; layers are checked above.
        assert sqnr(result.lowered(*inputs), engine(*inputs)) > 15


@pytest.mark.parametrize("name", ["batch_norm", "grouped", "foreign"])
def test_images_of_a_batch_do_not_depend_on_each_other(name: str) -> None:
    result = compiled(name, "plain")
    engine = OnnxRuntimeEngine(exported(name, "plain"), threads=1)
    inputs = inputs_of(result.lowered, 4)
    whole = engine(*inputs)
    alone = torch.cat([engine(*(v[i : i + 1] for v in inputs)) for i in range(4)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=0.03 * float(whole.abs().max()))
    assert sqnr(whole, alone) > 40
