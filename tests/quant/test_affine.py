import torch

from edadm_compile.quant.affine import dequantize, per_channel, quantize, split_hi_lo, weight_codes
from edadm_compile.quant.spec import act_spec, weight_spec


def test_ties_round_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    codes = quantize(x, torch.ones(1), torch.zeros(1), -128, 127)
    assert codes.tolist() == [-2, -2, 0, 0, 2, 2, 4]


def test_the_zero_point_is_added_after_rounding():
    # Rounding x / s + z instead would turn the tie 0.5 + 1 into 2.
    assert quantize(torch.tensor([0.5]), torch.ones(1), torch.ones(1), -128, 127).item() == 1


def test_codes_clamp_to_the_range():
    codes = quantize(torch.tensor([-1e9, -128.4, 126.6, 1e9]), torch.ones(1), torch.zeros(1), -128, 127)
    assert codes.tolist() == [-128, -128, 127, 127]


def test_every_code_survives_a_round_trip():
    for spec, zero in ((act_spec(8), -37.0), (act_spec(4), 3.0), (act_spec(16), 0.0)):
        codes = torch.arange(spec.qmin, spec.qmax + 1, dtype=torch.float32)
        scale, zero_point = torch.tensor([0.037]), torch.tensor([zero])
        assert torch.equal(
            quantize(dequantize(codes, scale, zero_point), scale, zero_point, spec.qmin, spec.qmax), codes
        )


def test_every_sixteen_bit_code_splits_exactly():
    codes = torch.arange(-32768, 127 * 256 + 128, dtype=torch.int32).to(torch.int16)
    hi, lo = split_hi_lo(codes)
    assert hi.dtype == lo.dtype == torch.int8
    assert torch.equal(hi.int() * 256 + lo.int(), codes.int())
    assert (int(hi.min()), int(hi.max()), int(lo.min()), int(lo.max())) == (-128, 127, -128, 127)


def test_weight_codes_use_one_scale_per_channel():
    weight = torch.tensor([[1.0, -2.0, 0.25], [10.0, -20.0, 2.5]])
    spec = weight_spec(4)
    assert weight_codes(weight, torch.tensor([0.5, 5.0]), spec).tolist() == [[2, -4, 0], [2, -4, 0]]
    other = weight_spec(4, axis=1)
    assert weight_codes(weight.t(), torch.tensor([0.5, 5.0]), other).tolist() == [[2, 2], [-4, -4], [0, 0]]


def test_per_channel_broadcasts_along_the_axis():
    assert per_channel(torch.ones(3), 4, 1).shape == (1, 3, 1, 1)
    assert per_channel(torch.ones(3), 2, 0).shape == (3, 1)
    assert per_channel(torch.ones(1), 4, None).shape == (1,)
