"""Ranges of convolution outputs: exact extremes of each channel, and the least error among the ranges tried."""

import pytest
import torch

from edadm_compile.errors import CalibrationError
from edadm_compile.passes.output_ranges import KEEP, ChannelObserver
from edadm_compile.quant.affine import dequantize, quantize
from edadm_compile.quant.observers import affine_from_range, search_outputs
from edadm_compile.quant.spec import act_spec

SPEC = act_spec(8)
COUNT = 60_000  # enough for a clipped outlier to pay


def errors(x, scale, zero):
    """Squared error of each channel of [n, C]."""
    return (dequantize(quantize(x, scale, zero, SPEC.qmin, SPEC.qmax), scale, zero) - x).double().square().sum(dim=0)


def columns():
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(COUNT, generator=generator)
    outlier, mild, low = normal.clone(), normal.clone(), -normal.abs()
    outlier[7], mild[7], low[7] = 3000.0, 9.0, -9.0
    return {
        "normal": normal,
        "relu": normal.relu(),
        "negative": -normal.abs(),
        "constant": torch.full((COUNT,), 3.7),
        "negative constant": torch.full((COUNT,), -0.2),
        "zero": torch.zeros(COUNT),
        "outlier beyond every range": outlier,
        "outlier": mild,
        "negative outlier": low,
        "tiny": normal * 1e-9,
        "huge": normal * 1e9,
        "far from zero": normal * 0.01 + 5.0,
        "uniform": torch.rand(COUNT, generator=generator) - 0.7,
    }


@pytest.fixture(scope="module")
def sample():
    return torch.stack(list(columns().values()), dim=1)


def searched(x):
    return search_outputs(x, x.amin(dim=0), x.amax(dim=0), SPEC)


def test_no_channel_loses_to_its_whole_range(sample):
    scale, zero = searched(sample)
    assert scale.shape == zero.shape == (sample.shape[1],) and scale.dtype == zero.dtype == torch.float32
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())
    assert torch.equal(zero, zero.round()) and int(zero.min()) >= -128 and int(zero.max()) <= 127
    whole = affine_from_range(sample.amin(dim=0), sample.amax(dim=0), SPEC)
    assert bool((errors(sample, scale, zero) <= errors(sample, *whole) * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", list(columns()))
def test_the_least_error_among_sixteen_ranges(name):
    """Recomputed in float64, channel by channel, from the ends that docs/quantization.md names."""
    x = columns()[name].double()
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    tried = []
    for i in range(16):
        shrink = 1 - i * (1 - 0.4375) / 15
        step = max((high - low) * shrink / 255, 1e-12)
        zero = min(max(round(-128 - low * shrink / step), -128), 127)
        codes = ((x / step).round() + zero).clamp(-128, 127)
        tried.append(float(((codes - zero) * step - x).square().sum()))
    scale, zero = searched(columns()[name][:, None])
    found = float(errors(columns()[name][:, None], scale, zero))
    floor = COUNT * (float(x.abs().max()) * 2.0**-22) ** 2  # what float32 loses of values that codes meet exactly
    assert found <= min(tried) * (1 + 1e-3) + floor
    assert found >= min(tried) * (1 - 1e-3) - floor


def test_an_outlier_is_clipped_where_that_pays():
    few = torch.rand(2000, generator=torch.Generator().manual_seed(5)) * 3
    rows = torch.stack((few, -few), dim=1).repeat(400, 1)  # 800 000 values within 3
    rows[7] = torch.tensor([6.0, -6.0])
    scale, zero = searched(rows)
    reach = float((127 - zero[0]) * scale[0]), float((-128 - zero[1]) * scale[1])
    assert 2.6 < reach[0] < 4.2 and -4.2 < reach[1] < -2.6
    whole = affine_from_range(rows.amin(dim=0), rows.amax(dim=0), SPEC)
    assert bool((errors(rows, *whole) > 1.4 * errors(rows, scale, zero)).all())


def test_an_outlier_is_kept_where_clipping_costs_more():
    x = columns()["outlier beyond every range"][:, None]
    scale, zero = searched(x)
    assert float((127 - zero) * scale) > 2999


def test_channels_do_not_know_of_each_other(sample):
    scale, zero = searched(sample)
    order = torch.randperm(sample.shape[1], generator=torch.Generator().manual_seed(0))
    for i in order.tolist():
        alone = searched(sample[:, i : i + 1])
        assert (float(alone[0]), float(alone[1])) == (float(scale[i]), float(zero[i]))


def test_constant_channels_are_met():
    x = torch.tensor([3.7, -0.2, 0.0, 1e-20]).repeat(50, 1)
    scale, zero = searched(x)
    found = dequantize(quantize(x, scale, zero, -128, 127), scale, zero)
    assert bool(torch.isfinite(found).all())
    assert bool(((found - x).abs() <= 2.0**-22 * x.abs() + 1e-12).all())
    assert zero.tolist() == [-128.0, 127.0, -128.0, -128.0]


def observed(*batches, keep=KEEP):
    observer, generator = ChannelObserver(), torch.Generator().manual_seed(1)
    for batch in batches:
        observer.update(batch, keep, generator)
    return observer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_the_extremes_are_those_of_all_batches(layout):
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(b, 5, 3, 7, generator=generator) + torch.arange(5.0)[:, None, None] for b in (4, 1, 3)]
    batches[1][0, 2, 1, 3], batches[2][2, 4, 2, 6], batches[0][0, 0, 0, 0] = 50.0, -60.0, -70.0
    observer = observed(*(b.contiguous(memory_format=layout) for b in batches), keep=1)
    values = torch.cat(batches).transpose(0, 1).flatten(1)
    assert torch.equal(observer.low, values.min(dim=1).values) and torch.equal(observer.high, values.max(dim=1).values)
    assert float(observer.high[2]) == 50 and float(observer.low[4]) == -60 and float(observer.low[0]) == -70
    scale, zero = observer.affine("layer", minmax=True)
    expected = affine_from_range(observer.low, observer.high, SPEC)
    assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])


@pytest.mark.parametrize(("keep", "kept"), [(10, 10), (1000, 24)])
def test_what_is_kept_comes_from_the_channel_itself(keep, kept):
    value = torch.arange(24.0).reshape(2, 1, 3, 4) + 100 * torch.arange(4.0)[:, None, None]
    rows = observed(value, keep=keep).kept.values
    assert rows.shape == (kept, 4)
    assert torch.equal((rows / 100).floor(), torch.arange(4.0).expand(kept, 4))
    assert torch.equal(rows - 100 * torch.arange(4.0), rows[:, :1].expand(kept, 4))  # whole pixels


def test_the_search_runs_on_what_is_kept_and_the_true_extremes():
    x = torch.randn(3, 4, 20, 20, generator=torch.Generator().manual_seed(3))
    x[1, 2, 5, 5] = 40.0
    observer = observed(x, keep=300)
    scale, zero = observer.affine("layer", minmax=False)
    values = x.movedim(1, -1).reshape(-1, 4)
    expected = search_outputs(observer.kept.values, values.amin(dim=0), values.amax(dim=0), SPEC)
    assert torch.equal(scale, expected[0]) and torch.equal(zero, expected[1])


@pytest.mark.parametrize("minmax", [True, False])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_with_the_layers_name(bad, place, minmax):
    batches = [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    batches[place][1, 2, 3, 0] = bad
    with pytest.raises(CalibrationError, match=r"output of down\.conv is not finite"):
        observed(*batches, keep=1).affine("down.conv", minmax=minmax)
