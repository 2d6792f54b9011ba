"""Where ONNX Runtime is missing, refuses the model, or the program has no ONNX form."""

import importlib.util
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from edadm_compile.config import QuantConfig
from edadm_compile.driver.compile import to_artifact
from edadm_compile.errors import ExportError, TargetError
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine, make_session, missing_packages
from edadm_compile.runtime.session import from_artifact
from tests.graphs import inputs_for, source_of
from tests.lowering.plans import QUICK

INSTALL = r"not installed; run: pip install 'edadm-compile\[onnx\]'"


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(artifact, monkeypatch, package):
    exported = convert(artifact.qdq, target("cpu"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    assert missing_packages() == package
    assert missing_packages(runtime=False) == ("" if package == "onnxruntime" else package)
    for start in (lambda: from_artifact(artifact, engine="onnxruntime"), lambda: OnnxRuntimeEngine(exported)):
        with pytest.raises(TargetError, match=f"engine: {package} {INSTALL}"):
            start()
    with pytest.raises(TargetError, match=f"{package} {INSTALL}"):
        make_session(b"", 1)
    with pytest.warns(RuntimeWarning, match=f"slow reference engine: .*{package} {INSTALL}") as caught:
        model = from_artifact(artifact)
    assert model.engine_name == "reference" and Path(caught[0].filename).name == Path(__file__).name
    inputs = inputs_for(artifact.lowered)
    with torch.no_grad():
        assert torch.equal(model(*inputs), artifact.lowered(*inputs))


def test_all_missing_packages_are_named(monkeypatch):
    assert missing_packages() == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    assert missing_packages() == "onnx, onnx_ir, onnxruntime" and missing_packages(runtime=False) == "onnx, onnx_ir"


def test_a_model_that_onnx_runtime_refuses(artifact, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("NOT_IMPLEMENTED: " + "long " * 200)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(TargetError, match=f"ONNX Runtime {onnxruntime.__version__} refuses the model: NOT_") as caught:
        from_artifact(artifact, engine="onnxruntime")
    assert len(str(caught.value)) < 500 and isinstance(caught.value.__cause__, RuntimeError)
    with pytest.warns(RuntimeWarning, match="slow reference engine: ONNX Runtime .* refuses the model"):
        assert from_artifact(artifact).engine_name == "reference"


def test_a_broken_graph_is_refused_when_the_engine_is_made(artifact, tmp_path):
    broken = convert(artifact.qdq, target("cpu"))
    next(node for node in broken.model.graph if node.op_type == "QuantizeLinear").op_type = "Nonsense"
    with pytest.raises(TargetError, match=r"refuses the model: .*Nonsense"):
        OnnxRuntimeEngine(broken)
    with pytest.raises(TargetError, match="refuses the model"):
        make_session(b"no model", 1)
    with pytest.raises(TargetError, match="refuses the model"):
        make_session(tmp_path / "missing.onnx", 1)


class Transposed(nn.Module):
    """A transposed convolution of x, whose 16-bit form has no ONNX form."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.ConvTranspose2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x, t):
        return self.head(self.stem(x).relu())


def test_a_program_without_an_onnx_form_runs_on_the_reference_engine():
    config = QuantConfig(**{**QUICK, "method": "default"})
    artifact = to_artifact(compile_source(source_of(Transposed(), steps=2), config, quality=False))
    with pytest.raises(ExportError, match="layer stem"):
        from_artifact(artifact, engine="onnxruntime")
    with pytest.warns(RuntimeWarning, match="slow reference engine: layer stem"):
        assert from_artifact(artifact).engine_name == "reference"
