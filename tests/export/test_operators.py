"""Every float operator against torch, at two batch sizes, and which operators have no ONNX form."""

import onnx
import pytest
import torch

from edadm_compile.errors import ExportError
from edadm_compile.export.operators import FLOAT_TABLE
from edadm_compile.ir.ops import FLOAT_OPS
from tests.export.cases import Case
from tests.export.element_cases import ELEMENT_CASES
from tests.export.layer_cases import LAYER_CASES
from tests.export.onnx_graphs import run_onnx, session
from tests.export.refused_cases import REFUSED
from tests.export.tensor_cases import TENSOR_CASES

CASES = ELEMENT_CASES + TENSOR_CASES + LAYER_CASES
BATCHES = (2, 5)  # the exporter sees 2 and 3

#: Operators of the closed table that no emitter is for.
WITHOUT_EMITTER = {
    # sizes and what is computed from them: plain numbers, which `Scope` knows
    "aten.sym_size.int", "aten.numel.default", "operator.add", "operator.sub", "operator.mul", "operator.floordiv",
    "operator.truediv", "operator.neg", "operator.mod", "operator.eq", "operator.ne", "operator.lt", "operator.le",
    "operator.gt", "operator.ge",
    # items of lists: `Scope` picks them itself
    "operator.getitem",
    # a view of memory with strides of its own: an ONNX tensor has no memory layout
    "aten.as_strided.default",
    # spellings that the pinned torch does not have, so that no graph can call them
    "aten.logsigmoid.default", "aten.normalize.default", "aten.softsign.default", "aten.upsample_nearest_exact2d.vec",
}  # fmt: skip


def assert_equal(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """Integers exactly, floats within the case's number of ulps."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if case.shape_only:
        return
    if not expected.dtype.is_floating_point:
        assert torch.equal(found, expected)
        return
    special = ~expected.isfinite()
    assert torch.equal(found[special].nan_to_num(7.0), expected[special].nan_to_num(7.0))
    assert torch.equal(found.isfinite(), ~special)
    found, expected = found[~special].double(), expected[~special].double()
    allowed = case.ulps * torch.finfo(torch.float32).eps * expected.abs().clamp(min=case.largest)
    worst = ((found - expected).abs() / allowed.clamp(min=1e-45)).max() if found.numel() else torch.tensor(0.0)
    assert ((found - expected).abs() <= allowed).all(), f"{float(worst) * case.ulps:.1f} ulps, allowed {case.ulps}"


@pytest.mark.parametrize("case", CASES, ids=[c.label for c in CASES])
def test_as_torch(case):
    graph = case.graph()
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    ready = session(model)
    for batch in BATCHES:
        for found, expected in zip(run_onnx(ready, graph.values(batch)), graph.reference(batch), strict=True):
            assert_equal(found, expected, case)


@pytest.mark.parametrize(("case", "reason"), REFUSED, ids=[c.label for c, _ in REFUSED])
def test_refused_with_the_reason(case, reason):
    with pytest.raises(ExportError, match=reason):
        case.graph().model()


def test_operators_without_an_emitter():
    assert FLOAT_OPS - set(FLOAT_TABLE) == WITHOUT_EMITTER
    assert set(FLOAT_TABLE) <= FLOAT_OPS


def test_every_emitter_has_a_case():
    assert {f"aten.{c.name}" for c in CASES} == set(FLOAT_TABLE)
    labels = [c.label for c in CASES]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize(
    ("words", "fused"),
    [("silu.default: floats", {"QuickGelu"}),
     ("scaled_dot_product_attention.default: plain", {"FusedMatMul", "Softmax", "MatMul"}),
     ("group_norm.default: images", {"Reshape", "InstanceNormalization", "BatchNormalization"}),
     ("upsample_nearest2d.vec: codes doubled", {"Resize"}),
     ("layer_norm.default: last dimension", {"LayerNormalization"})],
)  # fmt: skip
def test_onnx_runtime_runs_the_fast_form(words, fused, tmp_path):
    model = next(c for c in CASES if c.label == words).graph().model()
    session(model, optimized=tmp_path / "optimized.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left - {"Identity", "Shape"} == fused
