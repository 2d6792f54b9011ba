import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.quant.affine import dequantize, quantize, weight_codes
from edadm_compile.quant.observers import (
    affine_from_range,
    minmax_weight,
    search_activation,
    search_symmetric,
    search_weight,
)
from edadm_compile.quant.spec import act_spec, weight_spec


def _error(x, scale, zero, spec):
    return float((dequantize(quantize(x, scale, zero, spec.qmin, spec.qmax), scale, zero) - x).double().square().mean())


@settings(max_examples=80, deadline=None)
@given(
    low=st.floats(-1e4, 1e4, width=32),
    width=st.floats(0, 1e4, width=32),
    bits=st.sampled_from([2, 4, 8, 16]),
    symmetric=st.booleans(),
)
def test_zero_is_always_represented_exactly(low, width, bits, symmetric):
    spec = act_spec(bits, symmetric)
    scale, zero = affine_from_range(torch.tensor([low]), torch.tensor([low + width]), spec)
    assert float(scale) > 0 and float(zero) == round(float(zero)) and spec.qmin <= float(zero) <= spec.qmax
    code = quantize(torch.zeros(1), scale, zero, spec.qmin, spec.qmax)
    assert float(dequantize(code, scale, zero)) == 0.0
    # The range covers the interval and zero, up to the half step that rounding the zero point costs.
    reach = (spec.qmin - float(zero)) * float(scale), (spec.qmax - float(zero)) * float(scale)
    slack = 0.5 * float(scale) * (1 + 1e-4) + 1e-12
    assert reach[0] <= min(low, 0.0) + slack and reach[1] >= max(low + width, 0.0) - slack


def _tensors():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, generator=generator)
    outlier = normal.clone()
    outlier[17] = 500.0
    return {
        "normal": normal,
        "after silu": torch.nn.functional.silu(normal * 2),
        "softmax": torch.softmax(normal.reshape(40, 100), dim=1).flatten(),
        "relu": normal.relu(),
        "negative": -normal.abs(),
        "constant": torch.full((100,), 3.7),
        "negative constant": torch.full((100,), -0.2),
        "zero": torch.zeros(100),
        "outlier": outlier,
        "one value": torch.tensor([0.3]),
        "uniform": torch.rand(4000, generator=generator) - 0.7,
        "tiny": normal * 1e-9,
        "far from zero": normal * 0.01 + 5.0,
    }


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("kind", list(_tensors()))
def test_the_search_never_loses_to_min_max(kind, bits, symmetric):
    x, spec = _tensors()[kind], act_spec(bits, symmetric)
    low, high = float(x.min()), float(x.max())
    scale, zero = search_activation(x, low, high, spec)
    plain = affine_from_range(torch.tensor([low]), torch.tensor([high]), spec)
    assert scale.shape == zero.shape == (1,) and bool(torch.isfinite(scale)) and float(scale) > 0
    assert _error(x, scale, zero, spec) <= _error(x, *plain, spec) * (1 + 1e-5)


def test_an_outlier_is_clipped_when_that_pays():
    x, spec = _tensors()["normal"].clone(), act_spec(4)
    x[5] = 12.0
    scale, zero = search_activation(x, float(x.min()), 12.0, spec)
    plain = affine_from_range(x.min()[None], torch.tensor([12.0]), spec)
    assert _error(x, scale, zero, spec) < 0.5 * _error(x, *plain, spec)


def test_one_sided_tensors_spend_no_code_on_the_missing_side():
    spec = act_spec(8)
    for x, zero in ((_tensors()["softmax"], spec.qmin), (_tensors()["negative"], spec.qmax)):
        assert float(search_activation(x, float(x.min()), float(x.max()), spec)[1]) == zero


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_search_never_loses_to_min_max(bits, axis):
    weight = torch.randn(6, 6, 3, 3, generator=torch.Generator().manual_seed(bits))
    weight.select(axis, 2).zero_()
    weight.select(axis, 3).mul_(1e-6)
    weight.select(axis, 4)[0] = 60.0  # huge outlier
    weight.select(axis, 5).fill_(0.125)  # constant channel
    spec = weight_spec(bits, axis)
    errors = []
    for scale in (search_weight(weight, spec), minmax_weight(weight, spec)):
        assert scale.shape == (6,) and bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
        s = scale.reshape((-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1))
        codes = weight_codes(weight, scale, spec)
        assert not codes.select(axis, 2).any()
        errors.append((codes * s - weight).double().square().movedim(axis, 0).flatten(1).sum(dim=1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


def test_min_max_maps_the_largest_weight_to_the_largest_code():
    weight = torch.tensor([[0.5, -2.0], [3.0, 1.0]])
    assert torch.equal(minmax_weight(weight, weight_spec(4)), torch.tensor([2.0, 3.0]) / 7)
    assert weight_codes(weight, minmax_weight(weight, weight_spec(4)), weight_spec(4)).tolist() == [[2, -7], [7, 2]]


def test_a_symmetric_range_uses_the_extra_negative_code():
    scale, zero = affine_from_range(torch.tensor([-8.0]), torch.tensor([7.0]), act_spec(4, symmetric=True))
    assert (float(scale), float(zero)) == (1.0, 0.0)


def test_the_fine_search_never_loses_what_the_coarse_one_found():
    # Half of the observed range represents these values exactly; the fine grid around 1/2 has no candidate at 1/2.
    x, spec = torch.tensor([-2.0, -1.0, 0.0, 1.0] * 5), act_spec(2)
    scale, zero = search_activation(x, -4.0, 2.0, spec)
    assert _error(x, scale, zero, spec) == 0.0


@pytest.mark.parametrize(
    ("shift", "zero"), [(0.0, 0.0), (9.0, -8.0), (-9.0, 7.0)], ids=["both signs", "positive", "negative"]
)
def test_symmetric_search_pins_the_zero_point(shift, zero):
    """In the middle; at the first or last code where all values have one sign."""
    sample = torch.randn(4000, generator=torch.Generator().manual_seed(1)) + shift
    low, high = float(sample.min()), float(sample.max())
    assert (low < 0 < high) == (shift == 0)
    scale, found = search_symmetric(sample, low, high, act_spec(4))
    assert float(found) == zero
    errors = []
    for share in range(1, 101):
        s = max(high, -low) * share / 100 / (7 if shift == 0 else 15)
        codes = torch.clamp(torch.round(sample / s) + zero, -8, 7)
        errors.append((float(((codes - zero) * s - sample).square().mean()), s))
    assert float(scale) == pytest.approx(min(errors)[1], rel=1e-6)


def test_a_higher_power_minds_outliers_more():
    generator = torch.Generator().manual_seed(2)
    sample = torch.cat([torch.randn(5000, generator=generator), torch.full((3,), 30.0)])
    low, high = float(sample.min()), float(sample.max())
    for search in (search_activation, search_symmetric):
        scales = [float(search(sample, low, high, act_spec(4), power=power)[0]) for power in (1.0, 2.0, 4.0)]
        assert scales == sorted(scales) and scales[0] < scales[2]
    weight = torch.randn(2, 400, generator=generator)
    weight[0, 0] = 12.0
    narrow, wide = (search_weight(weight, weight_spec(3), power=power) for power in (2.0, 8.0))
    assert bool(narrow[0] < wide[0])
