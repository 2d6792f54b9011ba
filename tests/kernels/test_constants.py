import pytest
import torch

from edadm_compile.kernels import constants
from edadm_compile.kernels.launch import ConstantSpec
from edadm_compile.quant import packing
from tests.kernels.matmul_cases import reals, weight

CPU = torch.device("cpu")


def _make(transform, sources, **arguments):
    names = tuple(str(i) for i in range(len(sources)))
    spec = ConstantSpec(names, transform, arguments)
    return constants.make(spec, dict(zip(names, sources, strict=True)).__getitem__, "cpu")


def _device_weight(shapes, bits, **arguments):
    codes = [weight(shape, bits, seed) for seed, shape in enumerate(shapes)]
    packed = [packing.pack(c, bits) for c in codes]
    return codes, _make("weight", packed, bits=bits, shapes=[list(s) for s in shapes], **arguments)


SHAPES = {
    "one": [(1, 1)],
    "linear": [(5, 33)],
    "conv": [(7, 5, 3, 3)],
    "uneven window": [(3, 65, 1, 3)],
    "stacked": [(5, 40), (1, 40), (17, 40)],
    "stacked conv": [(4, 6, 3, 3), (3, 6, 3, 3)],
}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", list(SHAPES))
def test_weight(name, bits):
    """Every code stands where the layout says, everything else is zero."""
    shapes, block, rows = SHAPES[name], 64, 16
    channels = -(-shapes[0][1] // block) * block
    codes, device = _device_weight(shapes, bits, rows=rows, channels=channels, block=block)
    joined = torch.cat(codes).reshape(sum(s[0] for s in shapes), shapes[0][1], -1)  # [O, C, taps]
    outputs, inner, taps = joined.shape
    nibbles = packing.storage_bits(bits) == 4
    assert device.shape == (-(-outputs // rows) * rows, taps * channels // (2 if nibbles else 1))
    assert device.dtype == (torch.uint8 if nibbles else torch.int8) and device.is_contiguous()
    expected = torch.zeros(device.shape[0], taps * channels, dtype=torch.int8)
    expected.view(-1, taps, channels)[:outputs, :, :inner] = joined.transpose(1, 2)
    assert torch.equal(constants.weight_codes(device, bits, block), expected)
    if nibbles:  # byte j of a block holds codes j and j + block / 2
        blocks = expected.reshape(-1, block).tolist()
        low_high = [[(b[j] & 15) | (b[j + block // 2] & 15) << 4 for j in range(block // 2)] for b in blocks]
        assert device.reshape(-1, block // 2).tolist() == low_high


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_of_a_glu(bits):
    (codes,), device = _device_weight([(2 * 5, 40)], bits, rows=8, channels=64, block=64, glu=True)
    rows = constants.weight_codes(device, bits, 64)
    assert rows.shape == (16, 64)
    assert torch.equal(rows[:5, :40], codes[:5]) and torch.equal(rows[8:13, :40], codes[5:])
    assert not rows[5:8].any() and not rows[13:].any() and not rows[:, 40:].any()


def test_block_decides_the_order_of_nibbles():
    _, narrow = _device_weight([(4, 128)], 4, rows=4, channels=128, block=64)
    _, wide = _device_weight([(4, 128)], 4, rows=4, channels=128, block=128)
    assert not torch.equal(narrow, wide)
    assert torch.equal(constants.weight_codes(narrow, 4, 64), constants.weight_codes(wide, 4, 128))


def test_vector():
    a, b = reals(3, 0), reals(4, 1).double()
    joined = torch.cat((a, b.float()))
    assert _make("vector", [a, b], length=9).tolist() == [*joined.tolist(), 0, 0]
    assert _make("vector", [a], length=3, factor=256.0).tolist() == (a * 256).tolist()
    assert _make("vector", [], length=4).tolist() == [0, 0, 0, 0]
    halves = _make("vector", [a, a + 1], length=4, glu=True)
    assert halves.tolist() == [*a.tolist(), 0, *(a + 1).tolist(), 0] and halves.dtype == torch.float32


def test_a_vector_longer_than_its_place_is_an_error():
    with pytest.raises(RuntimeError):
        _make("vector", [reals(5, 0)], length=4)


def test_codes_and_post():
    row = _make("codes", [], value=-37, length=64)
    assert row.dtype == torch.int8 and row.tolist() == [-37] * 64
    post = _make("post", [torch.tensor([0.3]), torch.tensor(-5, dtype=torch.int32)])
    assert post.dtype == torch.float32 and torch.equal(post, torch.tensor([0.3, -5.0, 1.0]) / torch.tensor([1, 1, 0.3]))


@pytest.mark.parametrize("dtype", [torch.float16, "float16"])
def test_cast(dtype):
    source = reals((3, 4), 0).T
    made = _make("cast", [source], dtype=dtype)
    assert made.dtype == torch.float16 and made.is_contiguous() and torch.equal(made, source.half())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weight(bits, axis):
    shape = (5, 3, 3, 2)
    codes, scale = weight(shape, bits, 0), reals(5, 1).abs()
    packed = packing.pack(codes, bits)
    made = _make("dequantized_weight", [packed, scale], bits=bits, shape=shape, dtype=torch.float32, axis=axis)
    assert torch.equal(made, torch.ops.edadm.dequantize_weight(packed, scale, bits, list(shape), axis))
    assert made.is_contiguous()


def test_only_listed_transforms():
    with pytest.raises(KeyError):
        _make("transpose", [])
