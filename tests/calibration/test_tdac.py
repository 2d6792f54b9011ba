import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.calibration import tdac
from edadm_compile.config import TdacConfig
from edadm_compile.errors import CalibrationError


def _features(steps=6, seed=0, shape=(2, 3, 4, 5)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + i) + 0.3 * i for i in range(steps)]


def _naive(features, radius):
    """The published definition, pair by pair and position by position."""
    steps = len(features)
    density, variety = [0.0] * steps, [0.0] * steps
    for i, a in enumerate(features):
        for j, b in enumerate(features):
            if i == j:
                continue
            density[i] += float((a.double() - b.double()).square().mean()) <= radius
            rows_a, rows_b = (f.double().permute(0, 2, 3, 1).reshape(-1, f.shape[1]) for f in (a, b))
            for u, v in zip(rows_a, rows_b, strict=True):
                variety[i] += 1 - float(u @ v) / (float(u.norm()) * float(v.norm()))
    return density, variety


def _unit(values):
    low, high = min(values), max(values)
    return [(v - low) / (high - low) for v in values]


@pytest.mark.parametrize("radius", [15.0, 30.0])
def test_the_gram_form_equals_the_double_loop(radius):
    features = _features()
    density, diversity, used = tdac.score(features, TdacConfig(radius=radius))
    naive_density, naive_variety = _naive(features, radius)
    assert used == radius
    assert density.tolist() == pytest.approx(_unit(naive_density), abs=1e-12)
    assert diversity.tolist() == pytest.approx(_unit(naive_variety), abs=1e-9)


def test_the_weights_are_density_plus_weighted_diversity():
    features, config = _features(), TdacConfig(diversity_weight=5.0, min_per_step=0)
    result = tdac.tdac(features, 997, config)
    share = result.density + 5.0 * result.diversity
    ideal = 997 * share / share.sum()
    assert bool(((result.counts - ideal).abs() < 1).all()) and int(result.counts.sum()) == 997


def test_the_quantile_radius_does_not_depend_on_the_feature_scale():
    features = _features()
    plain = tdac.tdac(features, 100, TdacConfig())
    for factor in (2.0**-20, 1024.0):
        scaled = tdac.tdac([f * factor for f in features], 100, TdacConfig())
        assert scaled.radius == plain.radius * factor**2
        assert torch.equal(scaled.counts, plain.counts) and torch.equal(scaled.density, plain.density)


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 1.0])
def test_the_radius_is_a_quantile_of_the_distances_between_different_steps(quantile):
    features = _features(steps=4)
    pairs = [float((a.double() - b.double()).square().mean()) for a in features for b in features if a is not b]
    expected = float(torch.quantile(torch.tensor(pairs, dtype=torch.float64), quantile))
    assert tdac.score(features, TdacConfig(radius_quantile=quantile))[2] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [1, 7, 100])
def test_one_step(samples):
    result = tdac.tdac(_features(steps=1), samples, TdacConfig())
    assert result.counts.tolist() == [samples] and result.radius == 0.0


@pytest.mark.parametrize("steps", [2, 5])
def test_equal_features_give_a_uniform_allocation(steps):
    result = tdac.tdac(
        [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))] * steps, 10 * steps, TdacConfig()
    )
    assert result.counts.tolist() == [10] * steps
    assert not result.density.isnan().any() and not result.diversity.isnan().any()


@pytest.mark.parametrize("radius", [0.0, 1e9], ids=["none within", "all within"])
def test_equal_density_counts_as_no_information(radius):
    result = tdac.tdac(_features(), 60, TdacConfig(radius=radius))
    assert not result.density.any() and bool(torch.isfinite(result.diversity).all())
    assert int(result.counts.sum()) == 60 and int(result.counts.min()) >= 1


def test_zero_features_are_no_division_by_zero():
    result = tdac.tdac([torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 2, 3, 3)], 9, TdacConfig())
    assert int(result.counts.sum()) == 9 and not result.diversity.isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = _features()
    features[3][0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="step 3"):
        tdac.tdac(features, 10, TdacConfig())


_WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(weights=_WEIGHTS, samples=st.integers(0, 700), floor=st.integers(0, 3))
def test_allocations_sum_to_the_samples(weights, samples, floor):
    counts = tdac.allocate(torch.tensor(weights, dtype=torch.float64), samples, floor)
    assert counts.dtype == torch.int64 and int(counts.sum()) == samples and int(counts.min()) >= 0
    if samples >= floor * len(weights):
        assert int(counts.min()) >= floor
        rest, total = samples - floor * len(weights), sum(weights)
        ideal = torch.tensor(
            [rest * w / total if total > 0 else rest / len(weights) for w in weights], dtype=torch.float64
        )
        assert bool(((counts - floor - ideal).abs() < 1 + 1e-9).all())


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=2, max_size=20), samples=st.integers(1, 300))
def test_a_heavier_step_never_gets_fewer_samples(weights, samples):
    counts = tdac.allocate(torch.tensor(weights, dtype=torch.float64), samples, 0).tolist()
    for w, c in zip(weights, counts, strict=True):
        assert all(c >= other - 1 for v, other in zip(weights, counts, strict=True) if v <= w)


@settings(max_examples=100, deadline=None)
@given(steps=st.integers(1, 60), samples=st.integers(0, 500))
def test_the_uniform_allocation_is_even(steps, samples):
    counts = tdac.uniform(steps, samples).counts
    assert counts.numel() == steps and int(counts.sum()) == samples
    assert int(counts.max()) - int(counts.min()) <= (1 if samples % steps else 0)
