import dataclasses

import diffusers
import pytest
import torch
from torch import nn

from edadm_compile.calibration import collect as collecting
from edadm_compile.calibration import sampler
from edadm_compile.calibration.collect import bottleneck, collect
from edadm_compile.calibration.tdac import tdac, uniform
from edadm_compile.config import TdacConfig
from edadm_compile.errors import CalibrationError
from tests.graphs import DDIM, GraphBuilder, float_program, small_config, source_of

STEPS = 4


@pytest.fixture(scope="module")
def labelled(labelled_source, labelled_program):
    return labelled_source.module, labelled_program


def _brute_force(model, noise, labels):
    """States [steps, N, ...] of each trajectory, from the eager model and a plain diffusers loop."""
    scheduler = diffusers.DDIMScheduler.from_config({k: v for k, v in DDIM.items() if k != "_class_name"})
    scheduler.set_timesteps(STEPS)
    states, x = [], noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            states.append(x)
            x = scheduler.step(model(x, t.repeat(x.shape[0]), labels), t, x).prev_sample
    return torch.stack(states), scheduler.timesteps


def test_each_sample_is_the_state_at_its_step_of_its_own_trajectory(labelled):
    model, program = labelled
    config = small_config(calib_samples=23)
    generator = torch.Generator().manual_seed(5)
    found = collect(program, config, generator)
    # The same draws by hand: noise and labels of the scoring batch, then of the samples, then the shuffle.
    again = torch.Generator().manual_seed(5)
    sampler.draw_noise(program.signature, 3, again)
    sampler.draw_conditions(program.signature, 3, again)
    noise = sampler.draw_noise(program.signature, 23, again)
    (labels,) = sampler.draw_conditions(program.signature, 23, again)
    order = torch.randperm(23, generator=again)
    states, timesteps = _brute_force(model, noise, labels)
    assert torch.equal(found.step.bincount(minlength=STEPS), found.allocation.counts)
    assert torch.equal(found.t, timesteps[found.step]) and found.t.dtype == torch.int64
    assert torch.equal(found.conditions[0], labels[order])
    expected = states[found.step, order]
    assert float((found.x - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    first = found.step == 0
    assert torch.equal(found.x[first], noise[order][first])
    assert len(found.x.flatten(1).unique(dim=0)) == 23


def test_the_scoring_trajectories_are_kept(labelled):
    model, program = labelled
    found = collect(program, small_config(), torch.Generator().manual_seed(5))
    again = torch.Generator().manual_seed(5)
    noise = sampler.draw_noise(program.signature, 3, again)
    (labels,) = sampler.draw_conditions(program.signature, 3, again)
    states, timesteps = _brute_force(model, noise, labels)
    kept = found.trajectories
    assert torch.equal(kept.t, timesteps) and kept.x.shape == kept.prediction.shape == (STEPS, 3, 3, 8, 8)
    assert float((kept.x - states).abs().max()) <= 1e-4 * float(states.abs().max())
    with torch.no_grad():
        predictions = torch.stack([model(s, t.repeat(3), labels) for s, t in zip(states, timesteps, strict=True)])
    assert float((kept.prediction - predictions).abs().max()) <= 1e-4 * float(predictions.abs().max())


def test_the_allocation_follows_the_configuration(labelled):
    _, program = labelled
    plain = collect(program, small_config(method="minmax"), torch.Generator().manual_seed(0))
    off = collect(
        program, small_config(selection="uniform", tdac=TdacConfig(trajectories=3)), torch.Generator().manual_seed(0)
    )
    assert plain.allocation.counts.tolist() == off.allocation.counts.tolist() == uniform(STEPS, 12).counts.tolist()
    scored = collect(program, small_config(), torch.Generator().manual_seed(0))
    assert float(scored.allocation.diversity.max()) == 1.0


def test_the_score_does_not_depend_on_the_pieces_a_batch_runs_in(labelled, monkeypatch):
    _, program = labelled
    whole = collect(program, small_config(), torch.Generator().manual_seed(5))
    # Three trajectories in batches of two: a full piece and one that is filled up.
    pairs = dataclasses.replace(program, signature=dataclasses.replace(program.signature, min_batch=2))
    monkeypatch.setattr(collecting, "rows_at_once", lambda *given: 2)
    parts = collect(pairs, small_config(), torch.Generator().manual_seed(5))
    assert parts.allocation.diversity.tolist() == pytest.approx(whole.allocation.diversity.tolist(), abs=1e-4)
    assert parts.allocation.density.tolist() == pytest.approx(whole.allocation.density.tolist(), abs=1e-4)
    assert torch.equal(parts.step, whole.step)
    for found, expected in ((parts.x, whole.x), (parts.trajectories.prediction, whole.trajectories.prediction)):
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_the_score_looks_at_the_bottleneck(labelled):
    model, program = labelled
    found = collect(program, small_config(), torch.Generator().manual_seed(5))
    features = []
    handle = model.up.register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
    with torch.no_grad():
        for state, t in zip(found.trajectories.x, found.trajectories.t, strict=True):
            model(state, t.repeat(3), *found.trajectories.conditions)
    handle.remove()
    expected = tdac(features, 12, small_config().tdac)
    assert torch.equal(found.allocation.counts, expected.counts)
    assert found.allocation.diversity.tolist() == pytest.approx(expected.diversity.tolist(), abs=1e-4)


def test_the_same_generator_gives_the_same_set(labelled):
    _, program = labelled
    first, second, other = (collect(program, small_config(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first.x, second.x) and torch.equal(first.step, second.step)
    assert not torch.equal(first.x, other.x)


def test_a_prediction_that_is_not_finite_is_refused():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            return self.conv(x) / (t.float()[:, None, None, None] - 50.0).abs()

    with pytest.raises(CalibrationError, match="timestep 50"):
        collect(float_program(source_of(Broken())), small_config(), torch.Generator())


def test_the_bottleneck_can_be_named():
    build = GraphBuilder()
    inner = build.conv("a", build.x, 4, 4)
    program = build.program(build.op("aten.silu.default", inner))
    assert bottleneck(program, inner.name) is inner
    with pytest.raises(CalibrationError, match="'nothing'"):
        bottleneck(program, "nothing")


def test_a_graph_without_images_has_no_bottleneck():
    build = GraphBuilder(x=(4,))
    with pytest.raises(CalibrationError, match="4-D"):
        bottleneck(build.program(build.op("aten.silu.default", build.x)))


def test_stochastic_samplers_stay_reproducible(labelled):
    _, program = labelled
    noisy = dataclasses.replace(program, sampler=dataclasses.replace(program.sampler, eta=1.0))
    first, second = (collect(noisy, small_config(), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, collect(program, small_config(), torch.Generator().manual_seed(3)).x)
