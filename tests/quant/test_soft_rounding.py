import pytest
import torch

from edadm_compile.quant import observers
from edadm_compile.quant.affine import per_channel
from edadm_compile.quant.observers import minmax_weight, search_weight
from edadm_compile.quant.soft_rounding import GAMMA, ZETA, SoftRounding
from edadm_compile.quant.spec import weight_spec

SHAPES = [(5, 7, 3, 3), (1, 50), (3, 40_000), (300, 260), (32, 1)]


def _written_out(weight, scale, alpha, qmin, qmax):
    up = torch.clamp(torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
    return torch.clamp(torch.floor(weight / scale) + up, qmin, qmax) * scale


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_those_of_the_formula_bit_for_bit(shape, axis):
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = per_channel(torch.rand(shape[axis], generator=generator) + 0.1, len(shape), axis)
    start = torch.randn(shape, generator=generator) * 4
    ours, theirs = (start.clone().requires_grad_() for _ in range(2))
    found = SoftRounding.apply(weight, scale, ours, -8, 7)
    expected = _written_out(weight, scale, theirs, -8, 7)
    found.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(found, expected)
    assert torch.equal(ours.grad, theirs.grad)
    assert int((ours.grad == 0).sum()) > 0  # both clamps hold somewhere


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_do_not_change_the_searched_scales(shape, power):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    spec = weight_spec(4, 0)
    rows, full = observers._rows(weight, spec), minmax_weight(weight, spec)
    best, least = full.clone(), torch.full_like(full, float("inf"))
    for i in range(80):
        scale = full * (1.0 - 0.8 * i / 80)
        s = scale[:, None]
        error = observers._powered(torch.clamp(torch.round(rows / s), spec.qmin, spec.qmax) * s - rows, power).sum(
            dim=1
        )
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert torch.equal(search_weight(weight, spec, power=power), best)
