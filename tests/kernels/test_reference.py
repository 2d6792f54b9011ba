import math

import pytest
import torch
import torch.nn.functional as F

from edadm_compile.kernels import reference
from edadm_compile.quant import packing
from edadm_compile.quant.spec import act_spec, weight_spec

edadm = torch.ops.edadm
U = 2.0**-24


def _weight(shape, bits, seed=0):
    spec = weight_spec(bits)
    return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def _codes(shape, bits=8, seed=1):
    spec = act_spec(bits)
    return torch.randint(spec.qmin, spec.qmax + 1, shape, generator=torch.Generator().manual_seed(seed)).to(spec.dtype)


def _affine(channels, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=generator) * 1e-3 + 1e-5, torch.randn(channels, generator=generator)


def _joined(terms):
    """The accumulator of the whole code from those of its terms, exact in float64."""
    return terms[0].double() if len(terms) == 1 else terms[0].double() * 256 + terms[1].double()


def _check_output(result, terms, multiplier, bias, axis):
    """|result - exact| within the roundings of float(acc), the product and the sum (twice with two terms)."""
    m, b = multiplier.double(), bias.double()
    exact = _joined(terms) * m + b
    bound = exact.abs() + 2 * terms[-1].double().abs() * m
    if len(terms) == 2:
        bound = bound + (terms[1].double() * m + b).abs() + 2 * terms[0].double().abs() * 256 * m
    result = result.movedim(axis, -1).double()
    assert result.shape == exact.shape and result.dtype == torch.float64
    assert bool(((result - exact).abs() <= 1.01 * U * bound + 1e-30).all())


CONVOLUTIONS = {
    # batch, inner, outer, size, kernel, stride, padding, dilation, groups
    "size one": (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one pixel padded": (1, 3, 2, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "same": (2, 5, 7, (6, 5), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "stride two": (2, 4, 6, (7, 8), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stride and kernel uneven": (1, 3, 5, (9, 7), (1, 3), (2, 1), (0, 1), (1, 1), 1),
    "dilated": (1, 3, 4, (9, 9), (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "two groups": (2, 6, 10, (5, 5), (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (1, 11, 11, (5, 3), (3, 3), (2, 2), (1, 1), (1, 1), 11),
    "prime": (3, 13, 17, (11, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "pointwise": (2, 31, 37, (4, 4), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "wide halo": (1, 2, 3, (3, 3), (5, 5), (1, 1), (4, 4), (1, 1), 1),
}


@pytest.mark.parametrize(
    ("act_bits", "pad_value"),
    [(8, -128), (8, 127), (8, 5), (4, -8), (16, 0)],
    ids=["z low", "z high", "z odd", "a4", "a16"],
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_qconv2d(name, bits, act_bits, pad_value):
    batch, inner, outer, size, kernel, stride, padding, dilation, groups = CONVOLUTIONS[name]
    shape = (outer, inner // groups, *kernel)
    codes, weight = _codes((batch, inner, *size), act_bits), _weight(shape, bits)
    packed = packing.pack(weight, bits)
    settings = (pad_value, list(stride), list(padding), list(dilation), groups)
    matrix = packing.unpack_matrix(packed, bits, math.prod(shape[1:]))
    terms = reference.conv_accumulators(codes, matrix, kernel, *settings)
    assert [t.dtype for t in terms] == [torch.int32] * (2 if act_bits == 16 else 1)
    (ph, pw), halo = padding, float(pad_value)
    padded = F.pad(codes.double(), (pw, pw, ph, ph), value=halo)
    exact = F.conv2d(padded, weight.double(), stride=stride, dilation=dilation, groups=groups).permute(0, 2, 3, 1)
    assert torch.equal(_joined(terms), exact)
    multiplier, bias = _affine(outer)
    result = edadm.qconv2d(codes, packed, multiplier, bias, *settings, bits, list(shape))
    _check_output(result, terms, multiplier, bias, axis=1)


TRANSPOSED = {
    # batch, inner, outer, size, kernel, stride, padding, output padding, dilation
    "size one": (1, 1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (0, 0), (1, 1)),
    "doubling": (2, 3, 5, (4, 5), (4, 4), (2, 2), (1, 1), (0, 0), (1, 1)),
    "output padding": (1, 5, 3, (5, 4), (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    "uneven": (2, 2, 7, (3, 5), (2, 3), (3, 2), (0, 1), (2, 0), (1, 1)),
    "dilated": (1, 3, 2, (4, 4), (3, 3), (2, 2), (1, 1), (1, 1), (2, 2)),
    "stride one": (1, 4, 4, (5, 5), (3, 3), (1, 1), (1, 1), (0, 0), (1, 1)),
}


@pytest.mark.parametrize(("act_bits", "pad_value"), [(8, -128), (8, 31), (16, 0)], ids=["z low", "z odd", "a16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(TRANSPOSED))
def test_qconv_transpose2d(name, bits, act_bits, pad_value):
    batch, inner, outer, size, kernel, stride, padding, extra, dilation = TRANSPOSED[name]
    shape = (outer, inner, *kernel)
    codes, weight = _codes((batch, inner, *size), act_bits), _weight(shape, bits)
    packed = packing.pack(weight, bits)
    settings = (pad_value, list(stride), list(padding), list(extra), list(dilation), 1, bits, list(shape))
    terms = reference.transpose_accumulators(codes, packed, *settings)
    # What lies between and around the inputs means zero: it has the code z, and contributes z * w at every tap.
    zero = float(pad_value)
    centred = F.conv_transpose2d(
        codes.double() - zero, weight.double().transpose(0, 1), None, stride, padding, extra, 1, dilation
    )
    exact = centred.permute(0, 2, 3, 1) + zero * weight.double().flatten(1).sum(dim=1)
    assert torch.equal(_joined(terms), exact)
    multiplier, bias = _affine(outer)
    result = edadm.qconv_transpose2d(codes, packed, multiplier, bias, *settings)
    _check_output(result, terms, multiplier, bias, axis=1)


@pytest.mark.parametrize("act_bits", [4, 8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7), (2, 3, 33), (1, 17, 64), (3, 1, 2, 13)], ids=str)
@pytest.mark.parametrize("outer", [1, 2, 19])
def test_qlinear(shape, outer, bits, act_bits):
    codes, weight = _codes(shape, act_bits), _weight((outer, shape[-1]), bits)
    packed = packing.pack(weight, bits)
    terms = reference.linear_accumulators(codes, packed, bits, weight.shape)
    assert torch.equal(_joined(terms), codes.double() @ weight.double().t())
    multiplier, bias = _affine(outer)
    _check_output(
        edadm.qlinear(codes, packed, multiplier, bias, bits, list(weight.shape)), terms, multiplier, bias, axis=-1
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 7), (16, 33, 2)], ids=str)
@pytest.mark.parametrize(("zero_a", "zero_b"), [(0, 0), (-128, 127), (3, -77)])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_qmatmul(sizes, zero_a, zero_b, batch):
    m, k, n = sizes
    a, b = _codes((*batch, m, k)), _codes((*batch, k, n), seed=5)
    acc = reference.matmul_accumulator(a, b, zero_a, zero_b)
    exact = torch.zeros(*batch, m, n, dtype=torch.int64)
    for i in range(k):
        exact += (a[..., :, i : i + 1].long() - zero_a) * (b[..., i : i + 1, :].long() - zero_b)
    assert acc.dtype == torch.int32 and torch.equal(acc.long(), exact)
    scale = torch.tensor([0.0123])
    result = edadm.qmatmul(a, b, scale, zero_a, zero_b).double()
    truth = exact.double() * scale.double()
    assert bool(((result - truth).abs() <= 2.02 * U * truth.abs()).all())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [1, 31, 4608, 23040])
def test_extreme_codes_do_not_saturate(k, sign):
    codes = torch.full((1, k), -128, dtype=torch.int8)
    weight = torch.full((2, k), 127 * sign, dtype=torch.int8)
    (acc,) = reference.linear_accumulators(codes, packing.pack(weight, 8), 8, weight.shape)
    assert acc.tolist() == [[-128 * 127 * sign * k] * 2]
    narrow = torch.full((1, k), -8, dtype=torch.int8)
    (acc,) = reference.linear_accumulators(codes, packing.pack(narrow, 4), 4, narrow.shape)
    assert acc.tolist() == [[1024 * k]]
    wide = torch.full((1, k), 127 * 256 + 127, dtype=torch.int16)
    terms = reference.linear_accumulators(wide, packing.pack(weight, 8), 8, weight.shape)
    assert _joined(terms).tolist() == [[float((127 * 256 + 127) * 127 * sign * k)] * 2]


def test_extreme_codes_do_not_saturate_in_convolutions():
    codes = torch.full((1, 64, 5, 5), -128, dtype=torch.int8)
    matrix = torch.full((3, 576), 127, dtype=torch.int8)
    (acc,) = reference.conv_accumulators(codes, matrix, (3, 3), -128, (1, 1), (1, 1), (1, 1), 1)
    assert bool((acc == -128 * 127 * 576).all())


def test_the_exact_product_has_a_fallback(monkeypatch):
    a, b = _codes((7, 33)), _weight((5, 33), 8)
    fast = reference.int_matmul(a, b)
    monkeypatch.setattr(reference, "_int_mm_is_exact", lambda: False)
    slow = reference.int_matmul(a, b)
    assert fast.dtype == slow.dtype == torch.int32 and torch.equal(fast, slow)
    assert torch.equal(slow.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantize_and_dequantize(bits):
    spec, x = act_spec(bits), torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 10
    scale, zero = torch.tensor([0.1]), torch.tensor([0.0 if bits == 16 else 1.0])
    codes = edadm.quantize(x, scale, zero, bits, spec.symmetric)
    assert codes.dtype == spec.dtype
    expected = (torch.round(x / scale) + zero).clamp(spec.qmin, spec.qmax)
    assert torch.equal(codes.float(), expected)
    assert torch.equal(edadm.dequantize(codes, scale, zero), (expected - zero) * scale)


def test_dequantize_weight_returns_the_layout_its_layer_reads():
    weight, scale = _weight((5, 3, 2, 2), 4), torch.rand(5) + 0.1
    packed = packing.pack(weight, 4)
    expected = weight.float() * scale[:, None, None, None]
    assert torch.equal(edadm.dequantize_weight(packed, scale, 4, [5, 3, 2, 2], 0), expected)
    assert torch.equal(edadm.dequantize_weight(packed, scale, 4, [5, 3, 2, 2], 1), expected.transpose(0, 1))


def _operators():
    scale, zero = torch.tensor([0.1]), torch.tensor([3.0])
    conv, wide, linear = _weight((5, 2, 3, 3), 4), _weight((5, 4, 3, 2), 8), _weight((7, 9), 4)
    m5, m7 = _affine(5), _affine(7)
    image = _codes((2, 4, 6, 5))
    return {
        "quantize": (torch.randn(2, 3), scale, zero, 8, False),
        "quantize 16": (torch.randn(2, 3), scale, torch.zeros(1), 16, True),
        "dequantize": (_codes((2, 3)), scale, zero),
        "dequantize_weight": (packing.pack(conv, 4), m5[0], 4, [5, 2, 3, 3], 0),
        "dequantize_weight transposed": (packing.pack(conv, 4), m5[0], 4, [5, 2, 3, 3], 1),
        "dequantize_weight linear": (packing.pack(linear, 4), m7[0], 4, [7, 9], 0),
        "qconv2d": (image, packing.pack(wide, 8), *m5, 3, [2, 1], [1, 0], [1, 2], 1, 8, [5, 4, 3, 2]),
        "qconv2d 16": (
            _codes((2, 4, 6, 5), 16),
            packing.pack(wide, 8),
            *m5,
            0,
            [1, 1],
            [1, 1],
            [1, 1],
            1,
            8,
            [5, 4, 3, 2],
        ),
        "qconv_transpose2d": (image, packing.pack(wide, 8), *m5, 3, [2, 3], [1, 0], [1, 2], [1, 2], 1, 8, [5, 4, 3, 2]),
        "qlinear": (_codes((2, 3, 9)), packing.pack(linear, 4), *m7, 4, [7, 9]),
        "qmatmul": (_codes((2, 3, 4)), _codes((2, 4, 5)), scale, 3, -4),
    }


@pytest.mark.parametrize("name", list(_operators()))
def test_shape_functions_agree_with_the_kernels(name):
    operator, args = getattr(edadm, name.split()[0]).default, _operators()[name]
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
