import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.quant import packing
from edadm_compile.quant.spec import WEIGHT_BITS, weight_spec

_SIZES = st.sampled_from([1, 2, 3, 7, 13, 31, 32, 33, 37, 64, 97])


def _codes(shape, bits, seed):
    spec = weight_spec(bits)
    return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(WEIGHT_BITS),
    o=st.integers(1, 9),
    i=_SIZES,
    kernel=st.sampled_from([None, (1, 1), (1, 3), (2, 3), (3, 3)]),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(bits, o, i, kernel, seed):
    shape = (o, i) if kernel is None else (o, i, *kernel)
    codes = _codes(shape, bits, seed)
    packed = packing.pack(codes, bits)
    assert torch.equal(packing.unpack(packed, bits, shape), codes)
    k = codes[0].numel()
    assert packed.shape == (o, packing.packed_columns(k, bits))
    assert packed.dtype == (torch.uint8 if bits <= 4 else torch.int8)
    assert torch.equal(packing.unpack_matrix(packed, bits, k), packing.to_matrix(codes))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_extreme_codes_survive(bits):
    spec = weight_spec(bits)
    codes = torch.tensor([[spec.qmin, spec.qmax, 0, -1, 1]], dtype=torch.int8).repeat(2, 7)
    assert torch.equal(packing.unpack(packing.pack(codes, bits), bits, codes.shape), codes)


def test_the_int4_layout_never_changes():
    # 34 codes: one full block of 32 (byte j holds code j low, code j + 16 high) and one padded with zeros.
    codes = torch.tensor([[((7 * k) % 16) - 8 for k in range(34)]], dtype=torch.int8)
    assert packing.pack(codes, 4).tolist() == [
        [
            0x88,
            0xFF,
            0x66,
            0xDD,
            0x44,
            0xBB,
            0x22,
            0x99,
            0x00,
            0x77,
            0xEE,
            0x55,
            0xCC,
            0x33,
            0xAA,
            0x11,
            0x08,
            0x0F,
            *[0] * 14,
        ]
    ]
    distinct = torch.arange(32, dtype=torch.int32)
    low_high = torch.where(distinct < 16, distinct % 8, -1 - distinct % 8).to(torch.int8)[None]
    assert packing.pack(low_high, 4).tolist() == [[0xF0, 0xE1, 0xD2, 0xC3, 0xB4, 0xA5, 0x96, 0x87] * 2]


def test_storage_order_is_kernel_then_channel():
    codes = torch.arange(12, dtype=torch.int8).reshape(1, 3, 2, 2)  # code = 4 * channel + 2 * row + column
    assert packing.pack(codes, 8).tolist() == [[0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]]


def test_padding_codes_are_zero():
    assert packing.pack(torch.full((1, 1), -8, dtype=torch.int8), 4).tolist() == [[8] + [0] * 15]


def test_narrow_codes_take_a_nibble_and_wide_ones_a_byte():
    assert [packing.storage_bits(b) for b in WEIGHT_BITS] == [4, 4, 4, 8, 8, 8, 8]
    assert packing.packed_columns(33, 4) == 32 and packing.packed_columns(33, 5) == 33
