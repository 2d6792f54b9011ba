"""Layer losses train the roundings of their own layer alone."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from edadm_compile.passes.layer_taps import run_tapped


class TwoLayers(nn.Module):
    def forward(self, x, scale, w1, w2):
        hidden = torch.conv2d(x * scale, w1, None, [1, 1], [1, 1])
        return torch.conv2d(functional.silu(hidden), w2)


def _run(tapped):
    module = fx.symbolic_trace(TwoLayers())
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 5, 5), torch.ones(1), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 1, 1)]
    leaves[1:] = [v.double().requires_grad_() for v in leaves[1:]]
    leaves[0] = leaves[0].double()
    places = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = dict(zip(places, leaves, strict=True))
    nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
    layers = [n for n in nodes if n.name.startswith("conv2d")]
    taps = run_tapped(module, nodes, values, layers[:1] if tapped else ())
    return leaves, values[layers[0]], values[layers[1]], taps.get(layers[0])


def test_values_are_those_of_the_plain_run():
    _, hidden, out, tap = _run(True)
    _, plain_hidden, plain_out, none = _run(False)
    assert none is None
    assert torch.equal(hidden, plain_hidden) and torch.equal(out, plain_out) and torch.equal(tap, hidden)


def test_a_tap_trains_its_own_weight_only():
    leaves, _, _, tap = _run(True)
    tap.square().sum().backward()
    plain, hidden, _, _ = _run(False)
    hidden.square().sum().backward()
    torch.testing.assert_close(leaves[2].grad, plain[2].grad, rtol=1e-12, atol=0)
    assert plain[1].grad.abs() > 1, "without the tap the scale in front is trained too"
    assert leaves[1].grad is None or not leaves[1].grad.any()
    assert leaves[3].grad is None


def test_the_loss_of_the_output_goes_everywhere_as_without_taps():
    leaves, _, out, tap = _run(True)
    (out.square().sum() + 3 * tap.sum()).backward()
    plain, _, plain_out, _ = _run(False)
    plain_out.square().sum().backward()
    for mine, other in ((leaves[1], plain[1]), (leaves[3], plain[3])):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=0)
    again, hidden, _, _ = _run(False)
    (3 * hidden.sum()).backward()
    torch.testing.assert_close(leaves[2].grad, plain[2].grad + again[2].grad, rtol=1e-12, atol=0)


@pytest.mark.parametrize("needs", ["input", "weight"])
def test_what_needs_no_gradient_gets_none(needs):
    module = fx.symbolic_trace(TwoLayers())
    nodes = list(module.graph.nodes)
    layer = next(n for n in nodes if n.name == "conv2d")
    x = torch.randn(1, 3, 5, 5, requires_grad=needs == "input")
    weight = torch.randn(4, 3, 3, 3, requires_grad=needs == "weight")
    values = {layer.args[0]: x, layer.args[1]: weight}
    taps = run_tapped(module, [layer], values, [layer])
    (values[layer].sum() + taps[layer].sum()).backward()
    assert (x.grad is not None) == (needs == "input")
    assert (weight.grad is not None) == (needs == "weight")
