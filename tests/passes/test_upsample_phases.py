"""Phases instead of convolutions of upsampled images: exact, and only where it applies."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edadm_compile.config import QuantConfig
from edadm_compile.ir.analysis import is_layer, layer_weight
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.passes.upsample_phases import UpsamplePhases, phase_weights
from edadm_compile.pipeline import capture, float_passes
from tests.graphs import source_of

DEPLOY = Context(QuantConfig(deploy="onnxruntime"))


class Up(nn.Module):
    """A convolution of an upsampled image, in a network as small as may be."""

    def __init__(
        self, bias=True, factor=2.0, mode="nearest", kernel=3, stride=1, padding=1, dilation=1, groups=1, reads=1
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.up = nn.Conv2d(6, 4, kernel, stride, padding, dilation, groups, bias)
        self.factor, self.mode, self.reads = factor, mode, reads

    def forward(self, x, t):
        h = functional.interpolate(torch.tanh(self.stem(x)), scale_factor=self.factor, mode=self.mode)
        y = self.up(h)
        return y + h.mean() if self.reads == 2 else y


def programs(module, shape=(3, 4, 6)):
    """The float program before and after the pass."""
    torch.manual_seed(0)
    before = capture(source_of(module.eval(), shape, 2))
    passes = [p for p in float_passes() if not isinstance(p, UpsamplePhases)]
    before = run_passes(before, passes, Context(QuantConfig()))
    return before, UpsamplePhases().run(before.fork(), DEPLOY)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 1, 5), (3, 2, 2)])
def test_phases_compute_the_same_image(bias, shape):
    module = Up(bias)
    before, result = programs(module, shape)
    assert result.changed and result.stats == {"phases": 1}
    x, t = torch.randn(2, *shape, dtype=torch.float32), torch.tensor([5, 70])
    torch.testing.assert_close(result.program(x, t), before(x, t), rtol=0, atol=2e-6)
    torch.testing.assert_close(result.program(x, t), module(x, t), rtol=0, atol=2e-6)


def test_the_layer_keeps_its_name_and_has_four_ninths_of_the_products():
    before, result = programs(Up())
    layers = {layer_name(n): n for n in result.program.graph_module.graph.nodes if is_layer(n)}
    assert set(layers) == {"stem", "up"}
    assert tuple(layer_weight(result.program, layers["up"]).shape) == (16, 6, 2, 2)
    assert not any("upsample" in str(n.target) for n in result.program.graph_module.graph.nodes)
    assert any("upsample" in str(n.target) for n in before.graph_module.graph.nodes)


def test_every_tap_is_in_one_window_of_each_phase():
    weight = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    phases = phase_weights(weight)
    for phase in range(4):
        torch.testing.assert_close(phases[phase::4].sum((2, 3)), weight.sum((2, 3)))
    # rows of the last phase, (0, 0): the row above, then the two that are the same row of the small image
    torch.testing.assert_close(phases[3::4, :, 0, 0], weight[:, :, 0, 0])
    torch.testing.assert_close(phases[3::4, :, 1, 1], weight[:, :, 1:, 1:].sum((2, 3)))


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 3.0}, {"mode": "bilinear"}, {"kernel": 1, "padding": 0}, {"kernel": 5, "padding": 2}, {"stride": 2},
        {"padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"reads": 2},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_stay(change):
    before, result = programs(Up(**change))
    assert not result.changed
    assert [n.name for n in result.program.graph_module.graph.nodes] == [
        n.name for n in before.graph_module.graph.nodes
    ]


def test_programs_for_other_engines_stay():
    before, _ = programs(Up())
    assert not UpsamplePhases().run(before.fork(), Context(QuantConfig())).changed
