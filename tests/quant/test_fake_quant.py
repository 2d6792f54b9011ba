import pytest
import torch

from edadm_compile.quant.affine import dequantize, quantize, weight_codes
from edadm_compile.quant.fake_quant import ActFakeQuant, MaskPool, WeightFakeQuant
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import WEIGHT_BITS, act_spec, weight_spec


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _weight_quantizer(bits, weight, axis=0):
    spec = weight_spec(bits, axis)
    quantizer = WeightFakeQuant(spec, weight.shape[axis])
    quantizer.set_scale(search_weight(weight, spec))
    return quantizer


def _activation_quantizer(bits=8, scale=0.05, zero=-20.0):
    quantizer = ActFakeQuant(act_spec(bits))
    quantizer.set_affine(torch.tensor([scale]), torch.tensor([zero]))
    return quantizer


def test_quantizers_do_nothing_until_they_have_a_scale():
    x = _random(2, 3)
    assert ActFakeQuant(act_spec(8))(x) is x
    assert WeightFakeQuant(weight_spec(4), 2)(x) is x


def test_the_activation_quantizer_is_the_affine_map():
    quantizer, x = _activation_quantizer(), _random(64) * 4
    s, z = quantizer.scale.detach(), quantizer.zero_point
    expected = dequantize(quantize(x, s, z, -128, 127), s, z)
    with torch.no_grad():
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer(x).detach(), expected)  # the trainable form rounds the same way


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_rounding_starts_at_the_float_weight(bits, axis):
    weight = _random(5, 7, 3, 3)
    quantizer = _weight_quantizer(bits, weight, axis)
    quantizer.start_rounding(weight)
    s = quantizer._s(weight)
    inside = weight.clamp(quantizer.spec.qmin * s, quantizer.spec.qmax * s)
    assert bool(((quantizer(weight) - inside).abs() <= 0.0101 * s).all())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_untrained_rounding_is_nearest(bits):
    weight = _random(5, 40)
    quantizer = _weight_quantizer(bits, weight)
    nearest = weight_codes(weight, quantizer.scale, quantizer.spec)
    quantizer.start_rounding(weight)
    quantizer.finish_rounding(weight)
    assert torch.equal(quantizer.integer_codes(weight), nearest)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_finished_codes_are_floor_or_ceiling_and_in_range(bits):
    weight = _random(6, 50) * 3
    weight[0, :4] = torch.tensor([50.0, -50.0, 7.9, -8.1])
    quantizer = _weight_quantizer(bits, weight)
    quantizer.set_scale(quantizer.scale * 0.6)  # a scale that clips
    alpha = quantizer.start_rounding(weight)
    alpha.data = _random(6, 50, seed=9)
    up = alpha.detach() >= 0
    quantizer.finish_rounding(weight)
    codes, spec = quantizer.integer_codes(weight), quantizer.spec
    ratio = weight / quantizer.scale[:, None]
    expected = torch.where(up, torch.floor(ratio) + 1, torch.floor(ratio)).clamp(spec.qmin, spec.qmax)
    assert codes.dtype == torch.int8 and torch.equal(codes.float(), expected)
    assert quantizer.alpha is None
    assert int(codes.min()) >= {8: -127}.get(bits, -(2 ** (bits - 1))) and int(codes.max()) <= 2 ** (bits - 1) - 1
    assert torch.equal(quantizer(weight), codes.float() * quantizer.scale[:, None])


def test_soft_rounding_reaches_both_ends():
    quantizer = _weight_quantizer(4, _random(1, 3))
    quantizer.start_rounding(_random(1, 3)).data = torch.tensor([[-9.0, 0.0, 9.0]])
    assert quantizer.soft_rounding().tolist() == [[0.0, 0.5, 1.0]]


def test_gradients_reach_the_roundings_and_the_scale():
    weight, x = _random(4, 16), _random(32, 16) * 3
    w_quantizer, x_quantizer = _weight_quantizer(4, weight), _activation_quantizer()
    alpha = w_quantizer.start_rounding(weight)
    x_quantizer.log_scale.requires_grad_(True)
    loss = (x_quantizer(x) @ w_quantizer(weight).t() - x @ weight.t()).square().mean()
    loss.backward()
    assert alpha.grad is not None and float(alpha.grad.abs().max()) > 0
    assert x_quantizer.log_scale.grad is not None and float(x_quantizer.log_scale.grad.abs()) > 0


def test_the_scale_gradient_is_the_straight_through_one():
    quantizer, x = _activation_quantizer(scale=0.1, zero=0.0), torch.tensor([0.234, -0.31, 99.0])
    quantizer.log_scale.requires_grad_(True)
    quantizer(x).sum().backward()
    s = 0.1
    inside = sum(round(v / s) * s - v for v in (0.234, -0.31))  # d(s * ste(x / s)) / dlog(s)
    assert float(quantizer.log_scale.grad) == pytest.approx(inside + 127 * s, abs=1e-4)


def test_masks_drop_with_the_asked_probability():
    pool = MaskPool(0.25, torch.Generator().manual_seed(3))
    share = float(pool.take(torch.Size((400, 1000))).float().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 400_000) ** 0.5
    assert not MaskPool(0.0, torch.Generator()).take(torch.Size((10, 10))).any()
    assert MaskPool(1.0, torch.Generator()).take(torch.Size((10, 10))).all()


def test_masks_are_reproducible_and_fresh():
    first, second = (MaskPool(0.5, torch.Generator().manual_seed(7), size=4096) for _ in range(2))
    a, b = first.take(torch.Size((8, 33))), second.take(torch.Size((8, 33)))
    assert torch.equal(a, b) and a.shape == (8, 33) and a.dtype == torch.bool
    assert not torch.equal(first.take(torch.Size((8, 33))), a)
    other = MaskPool(0.5, torch.Generator().manual_seed(8), size=4096)
    assert not torch.equal(other.take(torch.Size((8, 33))), b)


def test_a_mask_larger_than_the_pool_wraps_around():
    mask = MaskPool(0.5, torch.Generator().manual_seed(0), size=64).take(torch.Size((3, 100)))
    assert mask.shape == (3, 100) and torch.equal(mask.flatten()[:64], mask.flatten()[64:128])


def test_dropped_elements_pass_unquantized():
    quantizer, x = _activation_quantizer(scale=0.3), _random(50, 20)
    quantizer.drop = MaskPool(0.5, torch.Generator().manual_seed(1))
    mask = MaskPool(0.5, torch.Generator().manual_seed(1)).take(x.shape)
    y = quantizer(x).detach()
    assert torch.equal(y[mask], x[mask])
    with torch.no_grad():
        assert torch.equal(y[~mask], quantizer(x)[~mask])  # evaluation never drops
