"""Both branches of classifier-free guidance in calibration, mean correction, figures and files."""

import dataclasses

import pytest
import torch
from torch import nn

import edadm_compile
from edadm_compile.calibration import guidance, sampler
from edadm_compile.calibration.collect import collect
from edadm_compile.calibration.tdac import tdac
from edadm_compile.driver.bench_inputs import draw
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.export import states
from edadm_compile.errors import ArtifactError
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.frontend import GuidanceOptions, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context
from edadm_compile.passes.calibrate import Calibrate
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.mean_correction import INPUT, MeanCorrection
from edadm_compile.passes.sensitivity import measurement_inputs
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, read_manifest, write
from edadm_compile.runtime.sampler_json import sampler_from_json, sampler_to_json
from edadm_compile.runtime.session import from_artifact
from tests.graphs import DDIM, TinyUNet, apply, assert_close, float_program, small_config

STEPS, NULL, SCALE = 4, 2, 3.0


def _source(module, scale=SCALE, **options):
    guided = GuidanceOptions(scale, NULL)
    sampler_spec = SamplerSpec(DDIM, STEPS)
    return source_from_module(
        module, sampler_spec, shape=(3, 8, 8), num_classes={"label": 5}, guidance=guided, **options
    )


@pytest.fixture(scope="module")
def source():
    return _source(TinyUNet(classes=5))


@pytest.fixture(scope="module")
def program(source):
    return float_program(source)


@pytest.fixture(scope="module")
def calibration(program):
    return collect(program, small_config(calib_samples=10), torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def guided_file(source):
    return to_artifact(compile_source(source, small_config()))


def test_every_chosen_state_is_there_with_and_without_its_condition(calibration):
    x, t, (labels,) = calibration.x, calibration.t, calibration.conditions
    assert x.shape[0] == t.shape[0] == labels.shape[0] == calibration.step.shape[0] == 20
    assert torch.equal(x[0::2], x[1::2]) and torch.equal(t[0::2], t[1::2])
    assert labels[0::2].tolist() == [NULL] * 10 and sorted(set(labels[1::2].tolist())) == [0, 1, 3, 4]
    assert int(calibration.allocation.counts.sum()) == 10 and len(x.flatten(1).unique(dim=0)) == 10


def test_samples_lie_on_guided_trajectories(source, program, calibration):
    """Not on those of the condition alone: the states after the first step show which."""
    generator = torch.Generator().manual_seed(5)
    for n in (3, 10):
        noise = sampler.draw_noise(program.signature, n, generator)
        (labels,) = sampler.draw_conditions(program.signature, n, generator, None, program.sampler.null)
    order = torch.randperm(10, generator=generator)
    found = {}
    for scale in (SCALE, 1.0):
        spec, seen = dataclasses.replace(program.sampler, guidance=scale), []
        sampler.sample(source.denoiser(), spec, noise, [labels], hook=lambda i, t, s, p, to=seen: to.append(s[-10:]))
        expected = torch.stack(seen)[calibration.step[1::2], order]
        found[scale] = float((calibration.x[1::2] - expected).abs().max()) / float(expected.abs().max())
    assert found[SCALE] <= 1e-4 < 1e-2 < found[1.0]


def test_features_and_trajectories_are_those_of_the_doubled_batch(source, calibration):
    kept, features = calibration.trajectories, []
    assert kept.x.shape == kept.prediction.shape == (STEPS, 6, 3, 8, 8)
    assert torch.equal(kept.x[:, :3], kept.x[:, 3:]) and kept.conditions[0][:3].tolist() == [NULL] * 3
    handle = source.module.up.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    with torch.no_grad():
        predictions = torch.stack(
            [source.module(x, t.repeat(6), *kept.conditions) for x, t in zip(kept.x, kept.t, strict=True)]
        )
    handle.remove()
    assert_close(kept.prediction, predictions, depth=2048)
    assert not torch.equal(predictions[:, :3], predictions[:, 3:])
    assert torch.equal(calibration.allocation.counts, tdac(features, 10, small_config().tdac).counts)
    one_branch = tdac([f[3:] for f in features], 10, small_config().tdac)
    assert not torch.equal(calibration.allocation.diversity, one_branch.diversity)


def test_the_measurement_batch_holds_both_branches(program, calibration):
    x, _, labels = measurement_inputs(calibration.trajectories, program.signature, 2)
    assert int((labels == NULL).sum()) * 2 == labels.numel() == x.shape[0]


def _branch_errors(program, quantized, trajectories):
    """float64 [T, 2B, C], mean error of each row over space."""
    with torch.no_grad():
        found = [
            quantized(x, t.repeat(x.shape[0]), *trajectories.conditions)
            for x, t in zip(trajectories.x, trajectories.t, strict=True)
        ]
    return (trajectories.prediction.double() - torch.stack(found).double()).mean(dim=(3, 4))


def test_the_mean_correction_is_right_for_the_guided_prediction(program, calibration):
    config = small_config(weight_bits=4)
    fake, _ = apply(program, AssignWidths(), InsertQuant(), Calibrate(), config=config, calibration=calibration)
    before = _branch_errors(program, fake, calibration.trajectories)
    m_u, m_c = before[:, :3].mean(dim=1), before[:, 3:].mean(dim=1)
    guided = m_u + SCALE * (m_c - m_u)
    context = Context(config, calibration=calibration)
    result = MeanCorrection().run(fake, context)
    table = result.program.time.lookup(calibration.trajectories.t)[INPUT].double()
    assert float((table - guided).abs().max()) <= 1e-6 * float(guided.abs().max()) + 1e-7
    assert result.stats["branches_apart"] == pytest.approx(float((m_c - m_u).abs().max()), rel=1e-4)
    after = _branch_errors(program, result.program, calibration.trajectories)
    left_u, left_c = after[:, :3].mean(dim=1), after[:, 3:].mean(dim=1)
    assert float((left_u + SCALE * (left_c - left_u)).abs().max()) <= 1e-6
    for other in (1.0, 5.0):  # what the docstring says is left at another scale
        left = left_u + other * (left_c - left_u)
        assert float((left - (other - SCALE) * (m_c - m_u)).abs().max()) <= 2e-6
        assert float(left.abs().max()) > 1e-4


def test_the_figures_are_of_the_guided_prediction_and_of_each_branch(program):
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 3, 4])
    offset = {True: 0.02, False: -0.01}

    def candidate(x_in, t, label):
        empty = label == NULL
        return program(x_in, t, label) + torch.where(empty, offset[True], offset[False])[:, None, None, None]

    found = compare_noise(program, candidate, program.sampler, x, [labels])
    rows = [[], []]

    def hook(index, t, x_in, prediction):
        rows[0].append(prediction)
        rows[1].append(candidate(x_in, torch.full((8,), int(t)), torch.cat((torch.full((4,), NULL), labels))))

    sampler.sample(program, program.sampler, x, [labels], hook=hook)
    reference, other = (torch.stack(r).double() for r in rows)
    halves = [sqnr(reference[:, part], other[:, part]) for part in (slice(0, 4), slice(4, 8))]
    assert found.branches == pytest.approx(halves, abs=1e-3)
    joined = [v[:, :4] + SCALE * (v[:, 4:] - v[:, :4]) for v in (reference, other)]
    assert found.sqnr == pytest.approx(sqnr(*joined), abs=1e-3)
    assert float((joined[1] - joined[0]).mean()) == pytest.approx(0.02 + SCALE * (-0.01 - 0.02), rel=1e-4)
    plain = compare_noise(program, candidate, dataclasses.replace(program.sampler, guidance=1.0), x, [labels])
    assert plain.branches is None and plain.sqnr > found.sqnr + 3


@pytest.mark.parametrize("guided", [True, False])
def test_a_doubled_call_is_two_calls(guided_file, guided):
    """The runtime takes whatever batch a pipeline doubles, and knows nothing of branches."""
    model = from_artifact(guided_file, engine="reference")
    x, label = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 4, 1])
    empty = torch.full((3,), NULL)
    spec = dataclasses.replace(model.sampler, guidance=SCALE if guided else 1.0)
    ours = sampler.sample(model.predict, spec, x, [label])
    scheduler, state = sampler.make_scheduler(spec), x
    for t in scheduler.timesteps:
        c = model(state, t, label)
        u = model(state, t, empty)
        state = scheduler.step(u + SCALE * (c - u) if guided else c, t, state).prev_sample
    assert float((ours - state).abs().max()) <= 1e-4 * float(state.abs().max())


def test_files_keep_the_guidance_and_its_branch(guided_file, tmp_path):
    path = tmp_path / "guided.qmod"
    write(guided_file, path)
    for loaded in (read(path).lowered.sampler, edadm_compile.load(path).sampler):
        assert loaded.guidance == SCALE and loaded.null[0].dtype == torch.int64 and int(loaded.null[0]) == NULL
    manifest = read_manifest(path)
    assert manifest["sampler"]["guidance"] == SCALE and manifest["sampler"]["null"] == ["label"]
    assert len(manifest["quality"]["branches"]) == 2
    again = tmp_path / "again.qmod"
    write(read(path), again)
    assert path.read_bytes() == again.read_bytes()


def test_files_without_guidance_are_what_they_were(artifact, tmp_path):
    write(artifact, tmp_path / "plain.qmod")
    manifest = read_manifest(tmp_path / "plain.qmod")
    assert sorted(manifest["sampler"]) == ["eta", "scheduler", "steps"] and "branches" not in manifest["quality"]
    assert read(tmp_path / "plain.qmod").lowered.sampler.null == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": "3"}, "guidance '3'"),
        ({"guidance": True}, "guidance True"),
        ({"null": ["text"]}, r"without \['text'\] is not understood"),
        ({"null": []}, "guidance 3 has no unconditional branch"),
        ({"steps": 2.5}, "a number of steps"),
        ({"more": 1}, "expected a scheduler configuration, steps"),
    ],
    ids=["text", "bool", "name", "none", "steps", "unknown"],
)
def test_a_malformed_sampler_is_refused(program, change, message):
    tensors = {}
    value = sampler_to_json(program.sampler, program.signature, tensors)
    assert int(sampler_from_json(value, program.signature, tensors.__getitem__).null[0]) == NULL
    with pytest.raises(ArtifactError, match=message):
        sampler_from_json({**value, **change}, program.signature, tensors.__getitem__)
    wrong = {name: row.float() for name, row in tensors.items()}
    with pytest.raises(ArtifactError, match="the row of 'label'"):
        sampler_from_json(value, program.signature, wrong.__getitem__)


@pytest.mark.parametrize(("batch", "empty"), [(1, 0), (2, 1), (5, 2)])
def test_benchmarks_time_a_doubled_batch(program, batch, empty):
    labels = draw(program, batch, 2, 0)[0][2]
    assert labels[:empty].tolist() == [NULL] * empty
    assert not torch.equal(draw(program, 40, 1, 0)[0][2][20:], torch.full((20,), NULL))


class FixedBatch(nn.Module):
    """Its capture has a batch of its own: a branch on the number of rows."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_channels, self.image_size = inner, 3, 8

    def forward(self, x, t, label):
        return self.inner(x, t, label) if len(list(x)) == x.shape[0] else x


def test_a_model_with_a_fixed_batch_is_guided_like_one_without(source, program, calibration):
    fixed = float_program(_source(FixedBatch(source.module)))
    signature = fixed.signature
    assert signature.min_batch == signature.max_batch
    found = collect(fixed, small_config(calib_samples=10), torch.Generator().manual_seed(5))
    assert torch.equal(found.conditions[0], calibration.conditions[0])
    assert float((found.x - calibration.x).abs().max()) <= 1e-4 * float(calibration.x.abs().max())
    x, labels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 4, 1])
    assert_close(*(sampler.sample(m, program.sampler, x, [labels]) for m in (fixed, program)), depth=4096)
    some = states(fixed, fixed, {})
    assert all(len(v) == signature.min_batch for v in some) and int(some[2][-1]) != NULL


@pytest.mark.parametrize(
    ("null", "labels"), [(2, [0, 1, 3, 0, 1]), (0, [1, 2, 3, 1, 2]), (3, [0, 1, 2, 0, 1]), (4, [0, 1, 2, 3, 0])]
)
def test_the_null_label_is_no_class(null, labels):
    assert guidance.labels_in_turn(5, 4, torch.tensor(null)).tolist() == labels
    assert guidance.labels_in_turn(5, 4).tolist() == [0, 1, 2, 3, 0]
