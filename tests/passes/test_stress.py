"""Models that numbers go wrong in: each is handled with a warning or an error that names the layer."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edadm_compile.config import TdacConfig
from edadm_compile.driver import device_code
from edadm_compile.driver.compile import summary, to_artifact
from edadm_compile.errors import CalibrationError, ConfigError
from edadm_compile.pipeline import compile_source
from edadm_compile.report.tables import print_summary
from edadm_compile.runtime.artifact import read, write
from tests.graphs import Planted, small_config, source_of

NAN, INF = float("nan"), float("inf")


class Between(nn.Module):
    """Three convolutions; `change` is applied to the input of the middle one."""

    def __init__(self, change, head=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 3, padding=1)
        self.change = change
        with torch.no_grad():
            self.head.weight *= head

    def forward(self, x, t):
        return self.head(self.mid(self.change(self.stem(x))))


def planted(edit):
    model = Planted()
    with torch.no_grad():
        edit(model)
    return model


def compiled(model, steps=3, **settings):
    source = source_of(model, (3, 8, 8), steps)
    result = compile_source(source, small_config(tdac=TdacConfig(trajectories=2), **settings))
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 50])
    assert result.lowered(x, t).isfinite().all()
    assert all(u["after"] <= max(2 * u["before"], 1e-3) for u in result.stats["reconstruct"]["units"])
    return SimpleNamespace(source=source, result=result, warnings=result.warnings)


# values that are not finite


@pytest.mark.parametrize("bad", [NAN, INF], ids=["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = planted(lambda m: m.second.weight.view(-1)[3:5].fill_(bad))
    with pytest.raises(
        CalibrationError, match=r"weight second\.weight of layer second .* NaN or infinite values: 2 of 576"
    ):
        compiled(model)


def test_the_layer_that_first_overflows_is_named():
    model = planted(lambda m: m.second.weight.mul_(1e38))
    with pytest.raises(
        CalibrationError, match=r"at timestep \d+ is not finite: layer second \(aten\.conv2d\.default\) makes"
    ):
        compiled(model)


def test_an_operator_outside_of_layers_is_named_by_the_layer_before():
    with pytest.raises(CalibrationError, match=r"aten\.sqrt\.default behind layer stem makes it of finite values"):
        compiled(Between(torch.sqrt))


def test_a_mask_of_infinities_is_no_error():
    def masked(h):
        mask = torch.zeros(8, 8).fill_diagonal_(-INF)
        return torch.softmax(h + mask, dim=-1)

    assert compiled(Between(masked)).warnings == []


def test_a_loss_that_overflows_names_the_block():
    with pytest.raises(CalibrationError, match=r"the loss of block \w+ is (inf|nan): its values"):
        compiled(Between(lambda h: h * 1e20, head=1e-20))


# zeros and constants


@pytest.mark.parametrize(
    "settings", [{}, {"deploy": "onnxruntime"}, {"method": "eda-dm"}], ids=["default", "deploy", "eda-dm"]
)
def test_a_layer_of_zeros(settings):
    run = compiled(planted(lambda m: (m.second.weight.zero_(), m.second.bias.zero_())), **settings)
    assert run.warnings == [
        "all weights are 0, or too small for a scale, in layer second: untrained, or a broken checkpoint?"
    ]
    assert run.result.quality.sqnr > 15


def test_a_prediction_of_zeros_has_a_summary(tmp_path, capsys):
    run = compiled(planted(lambda m: (m.head.weight.zero_(), m.head.bias.zero_())))
    assert "in layer head" in run.warnings[0] and run.result.quality.sqnr == math.inf
    told = summary(run.result, run.source, tmp_path / "x.qmod", 1)
    assert told["notes"][-1] == run.warnings[-1] and told["sqnr_db"]["per_step"] == [None] * 3
    print_summary({**told, "device": None})
    assert "exact over all steps, worst step exact" in capsys.readouterr().out


def test_zero_channels_are_counted():
    def prune(m):
        m.second.weight[2:4].zero_()
        m.first.weight[0].zero_()

    run = compiled(planted(prune))
    assert run.warnings == ["output channels with no weight but 0 in layer first (1 of 8), second (2 of 8)"]


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_constant_input(value):
    run = compiled(Between(lambda h: h * 0 + value))
    assert run.warnings == [f"the input of layer mid is always {value:g} on the calibration set"]
    assert run.result.quality.sqnr > 20


def test_an_input_too_small_for_a_scale():
    (warning,) = compiled(Between(lambda h: h * 1e-20)).warnings
    assert warning.startswith("the input of layer mid stays within ") and "too small for a scale" in warning


# outliers and float16


def spike(h):
    """One value of each channel is 1e4."""
    corner = torch.zeros(8, 8)
    corner[0, 0] = 1e4
    return h + corner


def test_an_activation_with_outliers():
    (warning,) = compiled(Between(spike, head=1e-6)).warnings
    assert warning.startswith("outliers in the input of layer mid, head: that of mid reaches from ")
    assert "act_bits = 16" in warning
    assert "to 1e+04" in warning


def test_a_weight_with_an_outlier():
    model = Between(lambda h: h, head=1e-6)
    with torch.no_grad():
        model.mid.weight[1, 2, 0, 0] = 1e4
    outliers = [w for w in compiled(model).warnings if w.startswith("outliers among the weights")]
    assert len(outliers) == 1 and "in layer mid (1 of 8)" in outliers[0]


@pytest.fixture(scope="module")
def overflowing():
    """A model whose activations exceed float16."""
    return compiled(Between(lambda h: h * 1e6, head=1e-7))


def test_values_beyond_float16_are_reported_and_kept_in_the_file(overflowing, tmp_path):
    (warning,) = overflowing.warnings
    assert "behind layer stem" in warning and "float16 ends at 65504" in warning
    write(to_artifact(overflowing.result), tmp_path / "x.qmod")
    manifest = read(tmp_path / "x.qmod").manifest
    assert manifest["warnings"] == [warning]
    assert manifest["beyond_float16"]["where"] == "aten.mul.Tensor behind layer stem"
    assert manifest["beyond_float16"]["largest"] > 65504


def test_gpu_code_of_such_a_model_stores_float32(overflowing):
    beyond = overflowing.result.stats["calibrate"]["beyond_float16"]
    options = device_code.options_of("sm_90", "1", None)
    assert device_code.fitted(options, None, beyond).store == "float32"
    assert device_code.fitted(options, None, None) == options
    with pytest.raises(ConfigError, match=r"--store float16: values in aten\.mul\.Tensor behind layer stem exceed it"):
        device_code.fitted(options, "float16", beyond)
    bfloat = device_code.options_of("sm_90", "1", "bfloat16")
    assert device_code.fitted(bfloat, "bfloat16", beyond) == bfloat


def test_a_model_without_such_values_says_nothing_of_them():
    run = compiled(Planted())
    assert run.warnings == [] and run.result.stats["calibrate"]["beyond_float16"] is None
    assert not {"warnings", "beyond_float16"} & set(to_artifact(run.result).manifest)


# as few as possible


def test_one_step_of_the_sampler():
    run = compiled(Planted(), steps=1)
    assert run.warnings == [] and len(run.result.quality.per_step) == 1 and run.result.quality.sqnr > 15


def test_one_calibration_sample_and_batches_of_one():
    from edadm_compile.config import QuantConfig, ReconstructionConfig

    config = QuantConfig(
        calib_samples=1, tdac=TdacConfig(trajectories=1), reconstruction=ReconstructionConfig(iters=8, batch=1)
    )
    result = compile_source(source_of(Planted(), (3, 8, 8), 3), config)
    assert result.warnings == [
        "1 calibration sample(s) for 3 sampler steps: 2 steps have none, and all layers are calibrated without them; give "
        "--calib-samples 3 or more"
    ]
    assert result.quality.sqnr > 15
