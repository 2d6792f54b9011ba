"""The evaluate verb on a tiny model: what it reports, what it refuses, when it fails."""

from __future__ import annotations

import json
import math

import numpy
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import edadm_compile
from edadm_compile.calibration import sampler
from edadm_compile.cli import main
from edadm_compile.driver import evaluate, evaluate_sets
from edadm_compile.driver.compile import compile_model
from edadm_compile.errors import InputError, QualityError
from edadm_compile.evaluate import gates, pretrained
from edadm_compile.evaluate.compare import compare_images, compare_noise
from edadm_compile.evaluate.metrics import frechet, kernel_distance, psnr
from edadm_compile.evaluate.paired import evaluation_seed
from edadm_compile.evaluate.similarity import ssim
from edadm_compile.frontend import GuidanceOptions, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.passes.base import Context
from edadm_compile.report import evaluate_tables
from edadm_compile.runtime.artifact import write
from tests.frontend.test_feature_file import Pool, save
from tests.graphs import DDIM, TinyUNet, small_config

FACTORY = {"factory": "tests.graphs:TinyUNet", "shape": "3,8,8"}
SPEC = SamplerSpec(DDIM, 4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(artifact, state dict of the float model), alone in a folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    compile_model(TinyUNet().eval(), small_config(), sampler=SPEC, output=folder / "tiny.qmod", shape=(3, 8, 8))
    torch.save(TinyUNet().state_dict(), folder / "model.pt")
    return folder / "tiny.qmod", folder / "model.pt"


@pytest.fixture
def judged(files, tmp_path):
    """The same files with an extractor beside the float model, and real images."""
    reference = tmp_path / "model.pt"
    reference.write_bytes(files[1].read_bytes())
    save(tmp_path / "features.pt2", batch=(1, 64))
    real = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    numpy.savez(tmp_path / "real.npz", x=real.numpy())
    return files[0], reference, tmp_path / "real.npz", real


def measure(artifact, reference, **options):
    return edadm_compile.evaluate_model(
        artifact, reference, **{"count": 6, "engine": "reference", **FACTORY, **options}
    )


def inputs(count, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(evaluation_seed(seed)))


def test_the_report_is_complete(files):
    report = measure(*files)
    assert set(report) == {
        "artifact", "reference", "same_model", "engine", "scheduler", "steps", "count", "batch", "seed", "shape", "data",
        "features", "noise", "images", "distances", "left_out", "notes", "metrics", "gates", "failed",
    }  # fmt: skip
    assert (report["engine"], report["scheduler"], report["steps"]) == ("reference", "DDIMScheduler", 4)
    assert [r["timestep"] for r in report["noise"]["per_step"]] == sampler.timesteps(SPEC)
    assert report["noise"]["worst_step"] == min(report["noise"]["per_step"], key=lambda r: r["sqnr_db"])
    assert set(report["metrics"]) <= set(gates.HIGHER_IS_BETTER) | set(gates.LOWER_IS_BETTER)
    assert set(report["left_out"]) == {"features", "data", "lpips", "inception"} and report["distances"] == []
    assert "put features.pt2 beside the reference" in report["left_out"]["features"]
    assert report["gates"] == [] and report["failed"] == []
    assert report["images"]["ssim_window"] == 7 and "window of 7x7" in report["notes"][0]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize("batch", [6, 4])
def test_figures_are_those_of_the_two_models(files, batch):
    report = measure(*files, batch=batch)
    module, model = TinyUNet().eval(), edadm_compile.load(files[0], engine="reference")
    x = inputs(6)
    noise = compare_noise(module, model.predict, SPEC, x, [])
    metrics = report["metrics"]
    found = [metrics[k] for k in ("sqnr", "sqnr_without_last", "sqnr_worst_step")]
    assert found == pytest.approx([noise.sqnr, noise.sqnr_without_last, noise.worst], abs=0.01)
    assert [r["sqnr_db"] for r in report["noise"]["per_step"]] == pytest.approx(list(noise.per_step), abs=0.01)
    original, images, _ = compare_images(module, model.predict, SPEC, x, [])
    decibels, similarity = psnr(original, images), ssim(original, images)
    assert metrics["psnr"] == pytest.approx(float(decibels.mean()), abs=0.05)
    assert metrics["psnr_median"] == pytest.approx(float(decibels.quantile(0.5)), abs=0.05)
    assert metrics["ssim"] == pytest.approx(float(similarity.mean()), abs=1e-3)
    assert metrics["ssim_worst"] == pytest.approx(float(similarity.min()), abs=1e-3)


def test_seeds_change_the_noise_and_none_is_that_of_a_compilation(files):
    assert measure(*files)["metrics"] == measure(*files)["metrics"]
    assert measure(*files, seed=1)["metrics"]["sqnr"] != measure(*files)["metrics"]["sqnr"]
    drawn = {Context(small_config(seed=s)).generator(salt).initial_seed() for s in range(50) for salt in range(1000)}
    assert not drawn & {evaluation_seed(s) + b for s in (0, 1, 1_000_000) for b in range(100)}


def test_distances_between_all_sets(judged):
    artifact, reference, path, real = judged
    report = measure(artifact, reference, data=path, count=20)
    assert report["features"] == str(reference.with_name("features.pt2")) and report["data"]["images"] == 40
    module, model = TinyUNet().eval(), edadm_compile.load(artifact, engine="reference")
    original, images, _ = compare_images(module, model.predict, SPEC, inputs(20), [])
    features = {n: Pool()(v.clamp(-1, 1)) for n, v in (("float", original), ("quantized", images), ("data", real))}
    rows = {tuple(row["between"]): row for row in report["distances"]}
    assert list(rows) == [("quantized", "float"), ("quantized", "data"), ("float", "data")]
    for (a, b), row in rows.items():
        assert row["dimension"] == 6 and row["samples"] == [len(features[a]), len(features[b])]
        assert row["frechet"] == pytest.approx(frechet(features[a], features[b]), rel=1e-3, abs=1e-7)
        kid, error = kernel_distance(features[a], features[b], paired=b == "float")
        assert row["kid"] == pytest.approx(kid, rel=1e-2, abs=1e-6)
        assert row["kid_standard_error"] == pytest.approx(error, rel=1e-2, abs=1e-6)
    for name, pair in (("", ("quantized", "float")), ("_data", ("quantized", "data"))):
        assert report["metrics"][f"frechet{name}"] == rows[pair]["frechet"]
        assert report["metrics"][f"kid{name}"] == rows[pair]["kid"]
    assert rows["quantized", "data"]["frechet"] > 10 * rows["quantized", "float"]["frechet"]


def test_an_extractor_beside_the_model_that_does_not_fit_is_left_out_and_a_given_one_refused(judged, tmp_path):
    artifact, reference, _path, _ = judged
    other = save(tmp_path / "features.pt2", shape=(2, 1, 16, 16))
    report = measure(artifact, reference)
    assert report["distances"] == [] and "takes images 1x16x16, the model makes 3x8x8" in report["left_out"]["features"]
    with pytest.raises(InputError, match=r"--features .* takes images 1x16x16"):
        measure(artifact, reference, features=other)


def test_few_samples_are_said_to_be_few(judged):
    artifact, reference, _, _ = judged
    assert "6 samples for 6 features" in " ".join(measure(artifact, reference, count=6)["notes"])
    assert "samples for" not in " ".join(measure(artifact, reference, count=7)["notes"])
    report = measure(artifact, reference, count=1)
    assert report["distances"] == [] and "-n is 1" in report["left_out"]["features"]


def both(monkeypatch, reference, candidate):
    """Replace the two models."""
    original = evaluate.sample_pairs
    monkeypatch.setattr(evaluate, "sample_pairs", lambda a, b, *rest, **kw: original(reference, candidate, *rest, **kw))


def test_equal_models_pass_every_limit(judged, monkeypatch):
    artifact, reference, _, _ = judged
    both(monkeypatch, lambda x, t: 0.5 * x, lambda x, t: 0.5 * x)
    report = measure(
        artifact, reference, fail_below="sqnr=1000,psnr=200,ssim=0.999999", fail_above="kid=0,frechet=1e-6"
    )
    assert (
        report["noise"]["sqnr_db"] is None and report["metrics"]["sqnr"] is None and report["gates"][0]["found"] is None
    )
    assert report["metrics"]["ssim"] == pytest.approx(1.0, abs=1e-12) and report["metrics"]["kid"] == 0
    assert all(g["passed"] for g in report["gates"]) and report["failed"] == []
    json.dumps(report, allow_nan=False)
    evaluate_tables.print_evaluation(report)


def test_limits(files):
    found = measure(*files)["metrics"]["sqnr"]
    report = measure(*files, fail_below=f"sqnr={found + 1},psnr=1")
    assert [(g["metric"], g["passed"]) for g in report["gates"]] == [("sqnr", False), ("psnr", True)]
    with pytest.raises(
        QualityError, match=rf"gate failed: sqnr .* is {found:.6g} dB, asked for at least {found + 1:g} dB$"
    ):
        evaluate.check(report)
    evaluate.check(measure(*files, fail_below=f"sqnr={found - 1}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail_above": "frechet=1"}, "--fail-above frechet: cannot be measured here: no feature extractor"),
        ({"fail_above": "frechet_data=1"}, "--fail-above frechet_data: cannot be measured here: no feature extractor"),
        ({"fail_above": "lpips=1"}, "--fail-above lpips: cannot be measured here: images of 8x8 are too small"),
        ({"fail_below": "inception_score=1"}, "--fail-below inception_score: cannot be measured here: torch-fidelity"),
        ({"fail_below": "sqrn=1"}, "did you mean 'sqnr'?"),
        ({"data": "nothing.npz"}, "--data nothing.npz does not exist"),
        ({"features": "nothing.pt2"}, "--features nothing.pt2 does not exist"),
        ({"count": 0}, "-n: got 0, allowed 1 or more"),
        ({"batch": 0}, "--batch: got 0, allowed 1 or more"),
        ({"seed": -1}, "--seed: got -1, allowed 0 to 1000000"),
        ({"engine": "tpu"}, "engine: got 'tpu'"),
        ({"sceduler": "x.json"}, "evaluate_model: unknown option 'sceduler'; allowed are shape, scheduler"),
        ({"shape": "3,16,16"}, "--reference takes inputs"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_bad_requests_are_refused_before_any_sampling(files, monkeypatch, options, message):
    monkeypatch.setattr(evaluate, "sample_pairs", None)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        measure(*files, **options)
    assert message in str(caught.value)


def test_unusable_real_images_show_before_any_sampling(judged, monkeypatch):
    artifact, reference, path, real = judged
    monkeypatch.setattr(evaluate, "sample_pairs", None)
    numpy.savez(path, x=real.numpy() * 255)
    with pytest.raises(InputError, match=r"--data .*real\.npz: float values from"):
        measure(artifact, reference, data=path)


def _end(value):
    """A predictor of `value` at the last step, of half its input before."""
    return lambda x, t: torch.full_like(x, value) if int(t[0]) == 0 else 0.5 * x


@pytest.mark.parametrize(
    ("reference", "candidate", "error", "message"),
    [
        (0.5, math.nan, QualityError, "6 of 6 images of the compiled model are not finite"),
        (0.5, math.inf, QualityError, "6 of 6 images of the compiled model are not finite"),
        (math.nan, 0.5, InputError, "--reference: 6 of 6 images of the float model are not finite"),
        (0.0, 0.5, QualityError, "no SQNR at timestep 0: the float model predicts exactly 0 there"),
    ],
)
def test_values_without_a_measure_are_refused(files, monkeypatch, reference, candidate, error, message):
    both(monkeypatch, _end(reference), _end(candidate))
    with pytest.raises(error, match=message):
        measure(*files)


def test_latents_are_not_taken_for_pixels(files, monkeypatch):
    original = evaluate.sample_pairs

    def far(*args, **options):
        pairs = original(*args, **options)
        pairs.reference.mul_(0.01).clamp_(-1, 1)
        return pairs

    assert "suits pixels and not latents" in " ".join(measure(*files)["notes"])  # an untrained model ends in noise
    monkeypatch.setattr(evaluate, "sample_pairs", far)
    assert "latents" not in " ".join(measure(*files)["notes"])


def test_another_sampler_is_said_to_miss_the_tables(files):
    report = measure(*files, steps=2)
    assert report["steps"] == 2 and len(report["noise"]["per_step"]) == 2
    assert "compiled for DDIMScheduler with 4 steps" in " ".join(report["notes"])


class Labelled(TinyUNet):
    """A model with five labels."""

    def __init__(self):
        super().__init__(classes=5)


def test_labels_come_from_the_user(artifact, tmp_path):
    write(artifact, tmp_path / "labelled.qmod")
    torch.save(Labelled().state_dict(), tmp_path / "model.pt")
    options = {"factory": "tests.driver.test_evaluate:Labelled", "conditions": tmp_path / "labels.safetensors"}
    found = []
    for labels in ([0, 1, 2, 3, 4], [3], [4]):
        save_file({"label": torch.tensor(labels)}, options["conditions"])
        found.append(measure(tmp_path / "labelled.qmod", tmp_path / "model.pt", **options)["metrics"]["sqnr"])
    assert len(set(found)) == 3
    save_file({"label": torch.tensor([0, 5])}, options["conditions"])
    with pytest.raises(InputError, match="--cond: label holds 0 to 5, allowed 0 to 4"):
        measure(tmp_path / "labelled.qmod", tmp_path / "model.pt", **options)


def test_inception_rows_where_the_network_is_here(files, monkeypatch):
    monkeypatch.setattr(pretrained, "inception_missing", lambda shape: "")
    monkeypatch.setattr(pretrained, "inception", lambda: lambda x: (Pool()(x).double(), Pool()(x).double()))
    monkeypatch.setattr(pretrained, "lpips_missing", lambda shape: "")
    monkeypatch.setattr(pretrained, "lpips", lambda a, b: 0.25)
    report = measure(*files, fail_below="inception_score=1", fail_above="fid=1000,lpips=0.2")
    assert [r["features"] for r in report["distances"]] == ["inception-v3"] and "frechet" not in report["metrics"]
    assert report["metrics"]["fid"] == report["distances"][0]["frechet"] and report["metrics"]["lpips"] == 0.25
    assert [g["passed"] for g in report["gates"]] == [True, True, False]
    assert 1 <= report["metrics"]["inception_score"] <= 6
    with pytest.raises(InputError, match="fid_data: cannot be measured here: no real images"):
        measure(*files, fail_above="fid_data=1")


def test_the_command_prints_and_exits(judged):
    artifact, reference, path, _ = judged
    args = [
        "evaluate",
        str(artifact),
        "--reference",
        str(reference),
        "--factory",
        FACTORY["factory"],
        "--shape",
        "3,8,8",
        "-n",
        "8",
    ]
    run = CliRunner().invoke(main, [*args, "--data", str(path), "--fail-below", "sqnr=1", "--fail-above", "kid=9"])
    text = " ".join(run.stdout.split())
    assert run.exit_code == 0, run.output
    for part in ("on the onnxruntime engine", "PSNR, dB", "SSIM (7x7)", "quantized to data", "±", "4 of 4", "passed",
                 "left out: LPIPS: images of 8x8 are too small", "note: SSIM with a window of 7x7"):  # fmt: skip
        assert part in text, part
    run = CliRunner().invoke(main, [*args, "--quiet", "--json", "--engine", "reference", "--fail-below", "sqnr=99"])
    report = json.loads(run.stdout)
    assert run.exit_code == 7 and report["engine"] == "reference" and report["gates"][0]["passed"] is False
    assert run.stderr.startswith("error: quality gate failed: sqnr") and "asked for at least 99 dB" in run.stderr
    run = CliRunner().invoke(main, [*args, "--fail-below", "sqnr=99"])
    assert run.exit_code == 7 and "FAILED" in run.stdout
    run = CliRunner().invoke(main, [*args, "--fail-below", "snqr=1"])
    assert run.exit_code == 2 and run.stderr.splitlines()[-1].startswith("error: --fail-below: unknown metric 'snqr'")


def test_spaces_are_none_without_a_network(files):
    judges = evaluate_sets.find_judges((3, 8, 8), 6, files[1], None, None)
    assert judges.extractor is None and not judges.inception and not judges.lpips


def test_a_guided_file_is_measured_with_its_guidance_and_without_the_null_label_as_a_class(tmp_path, monkeypatch):
    options = {"shape": (3, 8, 8), "num_classes": {"label": 5}, "guidance": GuidanceOptions(3, "last")}
    artifact, model = tmp_path / "guided.qmod", TinyUNet(classes=5).eval()
    compile_model(model, small_config(), sampler=SPEC, output=artifact, **options)
    monkeypatch.setattr(evaluate, "load_source", lambda *_: source_from_module(model, SPEC, **options))
    drawn, real = [], evaluate.sample_pairs

    def watched(reference, candidate, spec, x, conditions, **others):
        drawn.append((spec.guidance, conditions[0]))
        return real(reference, candidate, spec, x, conditions, **others)

    monkeypatch.setattr(evaluate, "sample_pairs", watched)
    result = measure(artifact, tmp_path / "model.pt", count=40)
    ((guidance, labels),) = drawn
    assert guidance == 3.0 and set(labels.tolist()) == {0, 1, 2, 3}
    assert result["noise"]["sqnr_db"] > 0
