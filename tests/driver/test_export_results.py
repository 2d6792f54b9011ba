"""What `export` measures, where it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from edadm_compile.config import QuantConfig
from edadm_compile.driver import export
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.errors import ContractError, ExportError, InputError
from edadm_compile.export.operators import layers
from edadm_compile.ir.program import SamplerSpec, layer_of
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, write
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from tests.export.onnx_graphs import run_onnx
from tests.exported_files import unharmed
from tests.graphs import DDIM, source_of
from tests.lowering.plans import QUICK
from tests.models import foreign
from tests.models.variants import make


def decibel(wanted: torch.Tensor, found: torch.Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    return float(10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum()))


def opened(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_the_figures_are_those_of_the_file(path, artifact, old):
    report = export.run(path, old)
    program = artifact.lowered
    inputs = export.states(program, OnnxRuntimeEngine(artifact.qdq), {})
    (found,) = run_onnx(opened(old), inputs)
    wanted = program(*inputs)
    ends = report["check"]["end_to_end"]
    # The session here has other options; a code on the border of two may differ.
    assert ends["sqnr_to_reference_db"] == pytest.approx(decibel(wanted, found), abs=1)
    assert ends["largest_value"] == pytest.approx(float(wanted.abs().max()), rel=1e-6)
    assert ends["largest_error"] == pytest.approx(float((found - wanted).abs().max()), rel=0.3)
    rows = report["check"]["layers"]
    with_weights = [i for n in artifact.qdq.graph_module.graph.nodes if (i := layer_of(n)) and i.kind != "matmul"]
    assert [r["layer"] for r in rows if r["kind"] != "matmul"] == [i.name for i in with_weights]
    assert sum(c["integer"] + c["float"] for c in report["check"]["counts"].values()) == len(rows)
    assert report["weights"]["layers"] == {"int4": 0, "int8": len(with_weights)}
    assert report["weights"]["float32_bytes"] == 4 * sum(torch.Size(i.weight_shape).numel() for i in with_weights)


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory):
    """(file, state dict that it was compiled from)"""
    folder = tmp_path_factory.mktemp("foreign")
    torch.save(foreign.build().state_dict(), folder / "weights.pt")
    config = QuantConfig(8, 8, **{**QUICK, "deploy": "onnxruntime"})
    compile_model(
        foreign.build(), config, sampler=SamplerSpec(DDIM, 3), output=folder / "foreign.qmod", shape=(3, 8, 8)
    )
    return folder / "foreign.qmod", folder / "weights.pt"


def test_a_reference_adds_the_quality_of_both_engines(foreign_file, tmp_path):
    file, weights = foreign_file
    report = export.run(file, tmp_path / "a.onnx", reference=weights, factory="tests.models.foreign:build")
    program, ready, module = read(file).lowered, opened(tmp_path / "a.onnx"), foreign.build()
    scheduler = DDIMScheduler.from_config(DDIM)
    scheduler.set_timesteps(3)
    x = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    noise, graph, reference = [], [], []
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = [x, t.expand(4).clone()]
            noise.append(module(*inputs))
            graph += run_onnx(ready, inputs)
            reference.append(program(*inputs))
            x = scheduler.step(noise[-1], t, x).prev_sample
    ends = report["check"]["end_to_end"]
    for name, found in (("sqnr_to_float_db", graph), ("reference_engine_sqnr_to_float_db", reference)):
        assert ends[name] == pytest.approx(decibel(torch.stack(noise), torch.stack(found)), abs=0.2), name
    assert report["output_scales"] == "in the reconstruction"


def test_a_reference_of_another_shape_is_refused(foreign_file, path, old):
    with pytest.raises(InputError, match="--reference takes other inputs"):
        export.run(path, old, reference=foreign_file[1], factory="tests.models.foreign:build")
    assert unharmed(old)


@pytest.fixture(scope="module")
def pipeline_file(tmp_path_factory):
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("pipeline") / "unet.qmod"
    compile_model(module, QuantConfig(4, 8, **QUICK), sampler=SamplerSpec(DDIM, 3), output=path)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline's folder with an older graph in it."""
    folder = tmp_path / "pipeline"
    for name in ("unet/model.onnx", "unet/config.json", "unet/weights.bin", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"older " + name.encode())
    return folder


def test_other_files_of_a_pipeline_stay(pipeline_file, pipeline):
    before = tree(pipeline)
    report = export.run(pipeline_file, pipeline, layout="diffusers", int4=True)
    after = tree(pipeline)
    changed = {name for name in after if after[name] != before.get(name)}
    assert after.keys() == before.keys() and changed == {"unet/model.onnx", "unet/config.json"}
    assert json.loads(after["unet/config.json"])["block_out_channels"] == [8]
    assert report["output"] == str(pipeline / "unet" / "model.onnx") and report["weights"]["layers"]["int4"] > 0
    assert report["bytes"] == sum(len(after[name]) for name in changed)


def test_a_pipeline_stays_as_it_is_when_the_graph_is_wrong(pipeline_file, pipeline, monkeypatch):
    before = tree(pipeline)
    right = layers.weight
    monkeypatch.setattr(layers, "weight", lambda s, n, c, scale, *a: right(s, n, c, scale * 2, *a))
    with pytest.raises(ContractError):
        export.run(pipeline_file, pipeline, layout="diffusers")
    assert tree(pipeline) == before


def test_nothing_is_left_of_a_new_folder_when_the_graph_is_wrong(pipeline_file, tmp_path, monkeypatch):
    right = layers.weight
    monkeypatch.setattr(layers, "weight", lambda s, n, c, scale, *a: right(s, n, c, scale * 2, *a))
    with pytest.raises(ContractError):
        export.run(pipeline_file, tmp_path / "new", layout="diffusers")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "why"), [("missing/pipeline", "does not exist"), ("unet_is_a_file", "needs a folder")]
)
def test_folders_that_cannot_be_made_are_refused(pipeline_file, tmp_path, place, why, monkeypatch):
    (tmp_path / "unet_is_a_file").mkdir()
    (tmp_path / "unet_is_a_file" / "unet").write_bytes(b"older")
    monkeypatch.setattr(export, "read", lambda path: pytest.fail("worked before looking"))
    with pytest.raises(ExportError, match=why):
        export.run(pipeline_file, tmp_path / place, layout="diffusers")
    assert tree(tmp_path) == {"unet_is_a_file/unet": b"older"} and not (tmp_path / "missing").exists()


def test_states_of_a_fixed_batch_are_one_batch_of_that_size(tmp_path):
    result = compile_source(source_of(make("len_of_batch"), steps=4), QuantConfig(**QUICK), quality=False)
    assert result.lowered.signature.min_batch == result.lowered.signature.max_batch == 2
    x, t = export.states(result.lowered, OnnxRuntimeEngine(result.qdq), {})
    assert x.shape == (2, 3, 8, 8) and t.tolist() == [25, 25] and t.dtype == torch.int64  # of 75, 50, 25, 0
    write(to_artifact(result), tmp_path / "a.qmod")
    check = export.run(tmp_path / "a.qmod", tmp_path / "a.onnx")["check"]
    assert check["broken"] == [] and any(row["error"] is not None for row in check["layers"])
    free = compile_source(source_of(make("scale_shift"), steps=4), QuantConfig(**QUICK), quality=False)
    x, t = export.states(free.lowered, OnnxRuntimeEngine(free.qdq), {})
    assert x.shape == (8, 3, 8, 8) and t.tolist() == [75, 75, 50, 50, 25, 25, 0, 0]
