"""The ONNX Runtime engine: one result in every run mode, whatever the inputs and the size of the model."""

import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from edadm_compile.config import QuantConfig
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.export import files
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.engines import onnxruntime as module
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine, make_session
from edadm_compile.runtime.session import CompiledModel
from tests.graphs import assert_close, inputs_for, source_of
from tests.lowering.plans import QUICK, inputs_of
from tests.models.variants import make


@pytest.fixture(scope="module")
def exported(artifact):
    return convert(artifact.qdq, target("cpu"))


@pytest.fixture(scope="module")
def engines(exported):
    """By number of threads."""
    return {threads: OnnxRuntimeEngine(exported, threads) for threads in (1, 2, 3)}


@pytest.fixture(scope="module")
def fixed():
    """A program captured with a batch of two."""
    config = QuantConfig(**QUICK)
    result = compile_source(source_of(make("len_of_batch"), steps=2), config, quality=False)
    assert (result.qdq.signature.min_batch, result.qdq.signature.max_batch) == (2, 2)
    return result


@pytest.fixture
def calls(monkeypatch):
    """(threads of the session, batch) of every run."""
    seen, run = [], module._bound_run

    def bound_run(session, specs, tensors, result):
        seen.append((session.get_session_options().intra_op_num_threads, len(result)))
        assert all(len(v) == len(result) for v in tensors)
        run(session, specs, tensors, result)

    monkeypatch.setattr(module, "_bound_run", bound_run)
    return seen


# run modes


@pytest.mark.parametrize(
    ("threads", "batch", "batches", "mode"),
    [
        (1, 1, (1, 99), "threads"), (1, 8, (1, 99), "threads"), (2, 1, (1, 99), "threads"), (2, 2, (1, 99), "callers"),
        (8, 2, (1, 99), "callers"), (2, 8, (1, 99), "callers"), (4, 4, (4, 4), "threads"), (4, 9, (4, 4), "threads"),
        (4, 1, (4, 4), "threads"), (4, 4, (1, 1), "threads"), (4, 4, (2, 99), "callers"),
    ],
)  # fmt: skip
def test_the_mode_follows_from_threads_batch_and_capture(threads, batch, batches, mode):
    engine = object.__new__(OnnxRuntimeEngine)
    engine.threads, engine.signature = threads, SimpleNamespace(min_batch=batches[0], max_batch=batches[1])
    assert engine.mode(batch) == mode


@pytest.mark.parametrize(
    ("threads", "batch", "expected"),
    [
        (1, 1, [(1, 1)]), (1, 5, [(1, 5)]), (2, 1, [(2, 1)]), (3, 1, [(3, 1)]), (2, 2, [(1, 1)] * 2),
        (2, 5, [(1, 3), (1, 2)]), (3, 2, [(1, 1)] * 2), (3, 5, [(1, 2), (1, 2), (1, 1)]), (3, 3, [(1, 1)] * 3),
    ],
)  # fmt: skip
def test_every_mode_gives_the_same_images(artifact, engines, calls, threads, batch, expected):
    inputs = inputs_for(artifact.lowered, batch)
    found = engines[threads](*inputs)
    assert sorted(calls, reverse=True) == expected
    assert found.dtype == torch.float32 and found.shape == inputs[0].shape and found.is_contiguous()
    for i in range(batch):  # one image, one thread; another one's row would differ by its noise
        assert_close(found[i : i + 1], engines[1](*(v[i : i + 1] for v in inputs)), depth=64)
    with torch.no_grad():
        assert sqnr(artifact.lowered(*inputs), found) > 30


def test_programs_with_a_fixed_batch_run_in_slices_of_it(fixed, calls):
    engine = OnnxRuntimeEngine(fixed.qdq, 3)
    for batch, slices in ((1, 1), (2, 1), (5, 3)):
        calls.clear()
        inputs = inputs_of(fixed.lowered, batch)
        found = engine(*inputs)
        assert calls == [(3, 2)] * slices and found.shape == inputs[0].shape
        for i in range(batch):
            alone = engine(*(v[i : i + 1] for v in inputs))
            assert_close(found[i : i + 1], alone, depth=64)
        with torch.no_grad():
            assert sqnr(fixed.lowered(*inputs), found) > 100  # every convolution of this model has a float output


def test_sessions_are_made_on_first_use_and_kept(exported, artifact, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    made, create = [], module.make_session
    monkeypatch.setattr(module, "make_session", lambda data, threads: made.append(threads) or create(data, threads))
    engine = OnnxRuntimeEngine(exported)
    assert engine.threads == 3 and made == [1]  # for callers; a model that cannot run is refused here
    for batch in (2, 5, 1, 1, 4):
        engine(*inputs_for(artifact.lowered, batch))
    assert made == [1, 3]
    assert OnnxRuntimeEngine(exported, 1).threads == 1 and made == [1, 3, 1]


def test_options_of_a_session(exported):
    session = make_session(files_bytes(exported), 2)
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert session.get_providers() == ["CPUExecutionProvider"]


def files_bytes(exported):
    data = module.serialised(exported.model)
    assert isinstance(data, bytes)
    return data


def test_calls_from_several_threads_do_not_mix(artifact, engines):
    inputs = [inputs_for(artifact.lowered, batch, seed) for seed, batch in enumerate((1, 2, 5, 3, 1, 4))]
    expected = [engines[1](*values) for values in inputs]
    with ThreadPoolExecutor(4) as pool:
        for threads in (1, 3):
            found = list(pool.map(lambda values, engine=engines[threads]: engine(*values), inputs * 2))
            for value, reference in zip(found, expected * 2, strict=True):
                assert_close(value, reference, depth=64)


def test_an_error_in_one_caller_reaches_the_user(artifact, engines, monkeypatch):
    run = module._bound_run

    def bound_run(session, specs, tensors, result):
        if len(result) == 1:
            raise RuntimeError("out of memory")
        run(session, specs, tensors, result)

    monkeypatch.setattr(module, "_bound_run", bound_run)
    with pytest.raises(RuntimeError, match="out of memory"):
        engines[3](*inputs_for(artifact.lowered, 5))  # callers get 2, 2 and 1


# inputs


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 4])
def test_inputs_may_lie_in_memory_as_they_like(artifact, engines, threads, batch):
    x, t, label = inputs_for(artifact.lowered, batch)
    expected = engines[threads](x, t, label)
    wide = torch.zeros(batch, 3, 16, 8)
    wide[:, :, ::2] = x
    forms = {
        "strided": (wide[:, :, ::2], torch.stack((t, t + 1), dim=1)[:, 0], torch.stack((label, t), dim=1)[:, 0]),
        "channels last": (x.contiguous(memory_format=torch.channels_last), t, label),
        "turned": (x.transpose(2, 3).contiguous().transpose(2, 3), t, label),
        "wider types": (x.double(), t.double(), label.int()),
        "part of a batch": (torch.cat((x, x))[batch:], torch.cat((t, t))[batch:], torch.cat((label, label))[batch:]),
        "with a gradient": (x.clone().requires_grad_(), t, label),
    }
    assert not forms["strided"][0].is_contiguous()
    model = CompiledModel(artifact, engines[threads])
    for name, inputs in forms.items():
        for found in (engines[threads](*inputs), model(*inputs)):
            assert torch.equal(found, expected) and not found.requires_grad, name
    assert torch.equal(x, inputs_for(artifact.lowered, batch)[0])  # bound, not written to


def test_results_of_earlier_calls_stay(artifact, engines):
    inputs = inputs_for(artifact.lowered, 3)
    first = engines[3](*inputs)
    copy = first.clone()
    engines[3](inputs[0] + 1, *inputs[1:])
    assert torch.equal(first, copy)


def test_a_graph_with_one_timestep_for_all(artifact, engines):
    engine = OnnxRuntimeEngine(convert(artifact.qdq, target("cpu"), scalar_time=True), 2)
    x, _, label = inputs_for(artifact.lowered, 5)
    t = torch.full((5,), 50)
    assert_close(engine(x, t, label), engines[2](x, t, label), depth=64)


# models too large for one message


@pytest.mark.filterwarnings("error")
def test_a_large_model_runs_from_a_folder_that_goes_with_the_engine(artifact, exported, engines, monkeypatch):
    monkeypatch.setattr(files, "INLINE_LIMIT", 1000)
    engine = OnnxRuntimeEngine(exported, 3)
    folder = engine._data.parent
    assert engine._data == folder / "unet.onnx" and engine._data.is_file()
    assert (folder / "unet.onnx.data").stat().st_size > 1000
    for batch in (1, 5):  # a session with three threads, and one for callers
        inputs = inputs_for(artifact.lowered, batch)
        assert_close(engine(*inputs), engines[3](*inputs), depth=64)
    del engine
    gc.collect()
    assert not folder.exists()


def test_other_models_need_no_folder(engines, exported):
    size = files.weight_bytes(exported.model)
    assert size > 1000 and all(isinstance(e._data, bytes) for e in engines.values())
    assert len(engines[1]._data) > size
