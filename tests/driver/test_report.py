"""The report of a tiny model: what it measures, what it takes from the file, what it refuses."""

import json

import pytest
import torch

from edadm_compile.calibration import sampler
from edadm_compile.driver import report as driver
from edadm_compile.driver import report_facts
from edadm_compile.driver.layer_times import multiply_accumulates
from edadm_compile.driver.report_facts import Subject, gather
from edadm_compile.driver.report_images import data_uri, image_pairs
from edadm_compile.errors import ArtifactError, InputError
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.evaluate.metrics import psnr
from edadm_compile.evaluate.paired import evaluation_seed
from edadm_compile.runtime.artifact import Artifact, read, to_bytes, write
from edadm_compile.runtime.engines.reference import ReferenceEngine
from tests.graphs import TinyUNet, source_of


@pytest.fixture(scope="module")
def facts(artifact, labelled_source):
    subject = Subject(artifact, "tiny.qmod", 1000, "ab" * 32, labelled_source, "model.pt", {"capture": 1.0})
    with pytest.MonkeyPatch.context() as patch:  # integers that are the same everywhere; ONNX Runtime has its own tests
        patch.setattr(report_facts, "make_engine", lambda *args: ReferenceEngine(artifact.lowered))
        return gather(subject, count=3)


def _inputs(artifact, source, count=3):
    generator = torch.Generator().manual_seed(evaluation_seed(0))
    x = sampler.draw_noise(artifact.lowered.signature, count, generator)
    return x, sampler.draw_conditions(artifact.lowered.signature, count, generator, source.conditions)


def test_error_and_images_are_those_of_the_two_models_from_one_noise(facts, artifact, labelled_source):
    x, conditions = _inputs(artifact, labelled_source)
    spec, seed = artifact.lowered.sampler, evaluation_seed(0)
    found = compare_noise(labelled_source.denoiser(), ReferenceEngine(artifact.lowered), spec, x, conditions, seed)
    assert facts["noise"]["per_step"] == pytest.approx(list(found.per_step), abs=1e-3)
    assert facts["noise"]["timesteps"] == sampler.timesteps(spec)
    images = [
        sampler.sample(model, spec, x, conditions, generator=torch.Generator().manual_seed(seed))
        for model in (labelled_source.denoiser(), ReferenceEngine(artifact.lowered))
    ]
    wanted = psnr(*images).tolist()
    assert [p["psnr_db"] for p in facts["samples"]["images"]] == pytest.approx(wanted, abs=1e-2)
    assert facts["samples"]["psnr_db"]["worst"] == pytest.approx(min(wanted), abs=1e-2)
    assert facts["samples"]["psnr_db"]["median"] == pytest.approx(sorted(wanted)[1], abs=1e-2)


def test_ranges_are_there_for_every_quantized_layer_and_step(facts, artifact):
    layers = {row["layer"]: row for row in facts["ranges"]["layers"]}
    quantized = {r["layer"] for r in facts["layers"] if r["executed"] not in ("float", "table")}
    assert set(layers) == quantized and len(quantized) > 5
    steps = len(facts["noise"]["timesteps"])
    for row in layers.values():
        for i in range(steps):
            assert row["low"][i] <= row["lower"][i] <= row["upper"][i] <= row["high"][i]
        assert {len(row[k]) for k in ("low", "high", "lower", "upper")} == {steps}
        assert row["quantizer"][0] < row["quantizer"][1]


def test_the_stem_reads_the_noise_itself(facts, artifact, labelled_source):
    x, _ = _inputs(artifact, labelled_source)
    name = next(row["layer"] for row in facts["layers"] if row["role"] == "stem")
    stem = next(row for row in facts["ranges"]["layers"] if row["layer"] == name)
    assert stem["low"][0] == pytest.approx(float(x.min()), rel=1e-3)
    assert stem["high"][0] == pytest.approx(float(x.max()), rel=1e-3)


def test_curves_of_the_compilation_are_in_the_file(artifact, compiled, tmp_path):
    write(artifact, tmp_path / "a.qmod")
    manifest = read(tmp_path / "a.qmod").manifest
    selection = manifest["selection"]
    steps = sampler.timesteps(artifact.lowered.sampler)
    assert selection["timesteps"] == steps and len(selection["density"]) == len(selection["diversity"]) == len(steps)
    assert max(selection["density"] + selection["diversity"]) == 1.0
    measured = compiled.stats["assign_widths"]["sensitivity"]
    assert manifest["sensitivity"] == pytest.approx(measured, rel=1e-5)
    assert to_bytes(artifact) == (tmp_path / "a.qmod").read_bytes()


def test_a_file_alone_has_what_was_recorded(artifact):
    found = gather(Subject(artifact, "tiny.qmod", 1000, "00"))
    assert found["samples"] is None and found["ranges"] is None and found["reference"] is None
    assert found["noise"]["per_step"] == pytest.approx(artifact.manifest["quality"]["per_step"])
    assert found["selection"] == artifact.manifest["selection"] and found["units"]
    assert {m["what"] for m in found["missing"]} == {
        "Images from the same noise", "Activation ranges", "Time of each compilation stage"
    }  # fmt: skip


def test_times_are_measured_for_every_layer_that_runs(facts):
    pytest.importorskip("onnxruntime")
    times = facts["times"]
    assert times["kind"] == "measured"
    running = {r["layer"] for r in facts["layers"] if r["executed"] != "table" and r["kind"] != "attention"}
    assert set(times["layers"]) >= running and all(v > 0 for v in times["layers"].values())
    assert "Add" in times["between"]


def test_without_onnx_runtime_the_cost_model_is_named(artifact, monkeypatch):
    from edadm_compile.driver import layer_times

    monkeypatch.setattr(layer_times, "missing_packages", lambda: "onnxruntime")
    found = layer_times.layer_times(artifact)
    assert found["kind"] == "model" and not found["layers"]
    assert "Cost model, not time" in found["what"] and "pip install 'edadm-compile[onnx]'" in found["what"]


def test_products_are_counted_from_shapes(artifact, path):
    found = multiply_accumulates(artifact.lowered)
    records = [i for n in artifact.lowered.graph_module.graph.nodes if (i := n.meta.get("layer"))]
    assert set(found) == {i.name for i in records if i.weight_shape}
    stem = next(i for i in records if i.role == "stem")
    assert stem.weight_shape == (8, 3, 3, 3) and found[stem.name] == 8 * 8 * 8 * 3 * 3 * 3  # it keeps the 8 x 8 pixels
    assert found["label_proj"] == 8 * 8  # once for each image, not for each pixel
    assert multiply_accumulates(read(path).lowered) == found
    assert found["up"] == (4 * 4) * 8 * 10 * 4 * 4  # transposed: input pixels times the weights that read each


def test_the_verb_writes_page_and_data(path, tmp_path):
    result = driver.run(path, tmp_path / "r.html", data=tmp_path / "data")
    text = (tmp_path / "r.html").read_text()
    assert text.startswith("<!doctype html>") and result["bytes"] == (tmp_path / "r.html").stat().st_size
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == result["data"]
    assert json.loads((tmp_path / "data" / "noise.json").read_text())["per_step"]
    assert "missing" in result and result["psnr_db"] is None


def test_another_model_is_refused(artifact):
    other = source_of(TinyUNet())
    with pytest.raises(InputError, match="--reference takes inputs"):
        gather(Subject(artifact, "tiny.qmod", 1000, "00", other, "other.pt"))


@pytest.mark.parametrize("broken", [
    {"allocation": ["many"]}, {"sensitivity": {"a": "high"}}, {"units": [{"unit": "a", "before": None, "after": 1.0}]},
    {"selection": {"timesteps": [1.0], "density": "x", "diversity": None, "radius": None}},
])  # fmt: skip
def test_malformed_records_are_named(artifact, broken):
    changed = Artifact(artifact.qdq, artifact.lowered, {**artifact.manifest, **broken})
    with pytest.raises(ArtifactError, match=f"manifest's {next(iter(broken))}"):
        report_facts._recorded(changed)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(ArtifactError, match=r"folder .*nowhere does not exist; create it first"):
        driver.check(tmp_path / "nowhere" / "r.html")
    with pytest.raises(ArtifactError, match="it is a folder"):
        driver.check(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="it is a file"):
        driver.check(tmp_path / "r.html", tmp_path / "file")


def test_without_jinja2_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'edadm-compile\[report\]'"):
        driver.check(tmp_path / "r.html")


def test_pictures_show_black_grey_and_white():
    import base64
    import io

    import numpy as np
    from PIL import Image

    uri = data_uri(torch.tensor([[[-1.0, 0.0, 1.0, 9.0]]]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert pixels.tolist() == [[0, 128, 255, 255]]
    large = Image.open(io.BytesIO(base64.b64decode(data_uri(torch.zeros(4, 512, 256)).partition(",")[2])))
    assert large.size == (128, 256) and large.mode == "RGB"
    pair = image_pairs(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 1 / 8))[0]
    assert pair["difference"] == data_uri(torch.ones(1, 2, 2)) and pair["float"] != pair["quantized"]


def test_products_are_counted_in_a_file_that_was_read(path, labelled_source):
    """By hooks on the float model instead: output values of one image times the weights behind each."""
    wanted = {}

    def count(name):
        return lambda module, _, out: wanted.update({name: out[0].numel() * module.weight[0].numel()})

    module = labelled_source.module
    hooks = [
        found.register_forward_hook(count(name))
        for name, found in module.named_modules()
        if isinstance(found, (torch.nn.Conv2d, torch.nn.Linear))
    ]
    inputs = labelled_source.signature.inputs
    with torch.no_grad():
        module(*(torch.zeros((1, *spec.shape), dtype=spec.dtype) for spec in inputs))
    for hook in hooks:
        hook.remove()
    counted = multiply_accumulates(read(path).lowered)
    known = counted.keys() & wanted.keys()
    assert len(known) > 5 and {k: counted[k] for k in known} == {k: wanted[k] for k in known}
