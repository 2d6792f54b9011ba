import pytest
import torch

from edadm_compile.errors import ConfigError
from edadm_compile.quant.spec import ACT_BITS, WEIGHT_BITS, act_spec, weight_spec


@pytest.mark.parametrize("bits", [b for b in ACT_BITS if b != 16])
def test_activation_codes_use_the_whole_signed_range(bits):
    spec = act_spec(bits)
    assert (spec.qmin, spec.qmax, spec.axis, spec.dtype) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, None, torch.int8)
    assert not spec.symmetric and act_spec(bits, symmetric=True).symmetric


def test_sixteen_bit_codes_split_into_two_signed_bytes():
    spec = act_spec(16)
    assert (spec.qmin, spec.qmax, spec.symmetric, spec.dtype) == (-32768, 32639, True, torch.int16)
    assert (spec.qmax - 127) // 256 == 127 and spec.qmin // 256 == -128


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weight_codes_are_symmetric_in_scale_and_fit_signed_storage(bits):
    spec = weight_spec(bits, axis=1)
    assert spec.symmetric and spec.axis == 1
    assert (spec.qmin, spec.qmax) == ((-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", [0, 1, 9, 15, 17, 32])
def test_other_widths_are_refused(bits):
    with pytest.raises(ConfigError, match=str(bits)):
        act_spec(bits)
    with pytest.raises(ConfigError, match=str(bits)):
        weight_spec(bits)


def test_weights_have_no_sixteen_bits():
    with pytest.raises(ConfigError):
        weight_spec(16)
