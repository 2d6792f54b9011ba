"""Time tables in the graph: known timesteps, others, and both in one batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.errors import InputError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.export.convert import OUTPUT, convert
from edadm_compile.export.targets import target
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.graphs import TinyUNet, source_of
from tests.lowering.plans import QUICK


def network() -> TinyUNet:
    """A network on which the timestep has a large effect."""
    module = TinyUNet()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if ".emb." in name or name.startswith("time."):
                value.mul_(6)
    return module


@pytest.fixture(scope="module")
def compiled():
    return compile_source(source_of(network(), steps=4), QuantConfig(8, 8, **QUICK), quality=False)


def session_of(program, **options):
    model = convert(program, target("cpu"), **options).model
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def session(compiled):
    return session_of(compiled.qdq)


def close(found: np.ndarray, wanted: torch.Tensor) -> None:
    """The graph rounds outputs once more (25 dB and more); rows of a wrong timestep leave less than 15 dB."""
    assert found.shape == tuple(wanted.shape)
    assert sqnr(wanted, torch.from_numpy(found)) > 22


def noise(batch: int) -> torch.Tensor:
    return torch.randn((batch, 3, 8, 8), generator=torch.Generator().manual_seed(3))


def test_rows_of_another_timestep_are_told_apart(compiled):
    x = noise(2)
    first, second = (compiled.lowered(x, torch.full((2,), int(t))) for t in compiled.lowered.time.keys[[0, -1]])
    assert sqnr(first, second) < 15


@pytest.mark.parametrize("kind", ["known", "others", "mixed", "beyond"])
def test_any_timesteps_give_what_the_reference_engine_gives(compiled, session, kind):
    keys = [int(k) for k in compiled.lowered.time.keys]
    t = {"known": keys[:3], "others": [1, 37, 88], "mixed": [keys[-1], 37, keys[0]], "beyond": [99, 0, 98]}[kind]
    t, x = torch.tensor(t), noise(3)
    (found,) = session.run([OUTPUT], {"x": x.numpy(), "t": t.numpy()})
    close(found, compiled.lowered(x, t))


def test_one_timestep_serves_all_images(compiled, session):
    x, t = noise(3), int(compiled.lowered.time.keys[1])
    (found,) = session.run([OUTPUT], {"x": x.numpy(), "t": np.array([t])})
    (each,) = session.run([OUTPUT], {"x": x.numpy(), "t": np.array([t] * 3)})
    assert np.array_equal(found, each)


def test_a_scalar_timestep_is_an_input_without_dimensions(compiled):
    session = session_of(compiled.qdq, scalar_time=True)
    assert session.get_inputs()[1].shape == []
    x = noise(2)
    for t in (int(compiled.lowered.time.keys[2]), 41):
        (found,) = session.run([OUTPUT], {"x": x.numpy(), "t": np.array(t)})
        close(found, compiled.lowered(x, torch.full((2,), t)))


def test_the_float_path_is_behind_a_condition(session, compiled, tmp_path):
    model = convert(compiled.qdq, target("cpu")).model
    (choice,) = [n for n in model.graph if n.op_type == "If"]
    branches = [a.as_graph() for a in choice.attributes.values()]
    kinds = [{n.op_type for n in branch} for branch in branches]
    # The sampler's own timesteps cost a lookup; the layers of the time path are in the other branch alone.
    assert any("Gemm" in k or "MatMul" in k for k in kinds) and any(k <= {"ArgMax", "Gather"} for k in kinds)


def test_a_table_of_all_timesteps_is_indexed(compiled):
    source = source_of(network(), steps=4)
    schedule = {**source.sampler.scheduler, "num_train_timesteps": 8}
    source = dataclasses.replace(source, sampler=dataclasses.replace(source.sampler, scheduler=schedule))
    result = compile_source(source, QuantConfig(8, 8, **QUICK), quality=False)
    time = result.lowered.time
    assert time is not None
    assert time.path is None and time.keys.numel() == 8
    x, t = noise(3), torch.tensor([7, 0, 3])
    (found,) = session_of(result.qdq).run([OUTPUT], {"x": x.numpy(), "t": t.numpy()})
    close(found, result.lowered(x, t))
    engine = OnnxRuntimeEngine(result.qdq)
    for wrong in ([8, 0, 0], [0, -1, 0]):
        with pytest.raises(InputError, match=r"timestep: got \[.*\], allowed are the integers 0 to 7 of the schedule"):
            engine(x, torch.tensor(wrong))
