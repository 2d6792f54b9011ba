import pytest
import torch

from edadm_compile.kernels import constants, reference
from edadm_compile.kernels.registry import kernel
from edadm_compile.quant import packing
from tests.kernels.matmul_cases import add_segment, before_activation, check, linear_case, reals, weight

#: Interpreter of Triton 3.6: bounds of a loop are arrays of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

SHAPES = {
    "one": {"per_image": 1, "inner": 1, "outer": 1},
    "vector": {"per_image": 1, "inner": 130, "outer": 33},
    "context": {"batch": 2, "per_image": 77, "inner": 48, "outer": 20},
    "prime": {"batch": 3, "per_image": 17, "inner": 131, "outer": 37},
    "whole tiles": {"batch": 2, "per_image": 32, "inner": 128, "outer": 32},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes(name, bits):
    check("qlinear", *linear_case(**SHAPES[name], bits=bits))


FLAGS = {
    "row": {"ROW": True},
    "row of whole tiles": {"ROW": True, "per_image": 32},
    "residual codes": {"RESIDUAL": True, "ACT": 4, "OUT_Q": True},
    "codes only": {"OUT": False, "OUT_Q": True},
    "codes exact": {"OUT_Q": True, "EXACT": True},
    "channels first": {"OUT_NCHW": True},
    "statistics": {"STATS": True, "per_image": 48},
    "two sources": {"inner2": 66, "bits2": 4, "OUT_Q": True},
    "split": {"inner": 330, "SPLIT_K": 3},
    "one product per step": {"inner": 130, "DOTS": 1},
    "split statistics": {"inner": 330, "SPLIT_K": 4, "STATS": True, "per_image": 32, "bits": 4},
    "split two sources": {"inner": 70, "inner2": 130, "SPLIT_K": 2, "RESIDUAL": True},
    "many tiles": {"outer": 70, "per_image": 90, "BLOCK_K": 32},
    "fp16": {"RESIDUAL": True, "store": torch.float16},
}


@pytest.mark.parametrize("name", list(FLAGS))
def test_epilogue(name):
    check("qlinear", *linear_case(**{"batch": 2, "inner": 9, "outer": 21, **FLAGS[name]}))


@pytest.mark.parametrize("flags", [{}, {"bits": 4}, {"SPLIT_K": 2, "inner": 130}, {"inner2": 40, "SPLIT_K": 3}])
def test_glu(flags):
    case = linear_case(**{"batch": 2, "per_image": 9, "inner": 20, "outer": 21, "GLU": True, "OUT_Q": True, **flags})
    check("qlinear", *case, ulps=4, magnitude=before_activation("qlinear", *case))


def test_silu():
    case = linear_case(inner=30, ACT=1)
    check("qlinear", *case, ulps=4, magnitude=before_activation("qlinear", *case))


def test_order_of_tiles_covers_every_tile_once():
    """More groups of pixel tiles than one, the last of them short, and several channel tiles."""
    check("qlinear", *linear_case(per_image=16 * 11 - 3, inner=3, outer=35, BLOCK_K=32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_the_integer_dialect_bit_for_bit(act_bits, bits):
    generator = torch.Generator().manual_seed(3)
    low, high, kind = (-128, 128, torch.int8) if act_bits == 8 else (-32768, 32640, torch.int16)
    x = torch.randint(low, high, (2, 9, 70), generator=generator).to(kind)
    w, multiplier, bias = weight((11, 70), bits, 4), reals(11, 5).abs() * 1e-4, reals(11, 6)
    truth = torch.ops.edadm.qlinear(x, packing.pack(w, bits), multiplier, bias, bits, [11, 70])
    tensors, values = linear_case(batch=2, per_image=9, inner=70, outer=11)
    terms = reference.terms(x)
    for number, term, factor in zip(("", "2")[: len(terms)], terms, (256.0, 1.0)[-len(terms) :], strict=True):
        add_segment(tensors, values, number, term.reshape(-1, 70), w, bits, 0)
        device = torch.device("cpu")
        tensors[f"multiplier{number}"] = constants.vector([multiplier], device, length=16, factor=factor)
        tensors[f"bias{number}"] = constants.vector([bias] if factor == 1 else [], device, length=16)
    values["SEGMENTS"] = len(terms)
    result = check("qlinear", tensors, values)
    out = result["out"].as_strided((18, 11), (values["OUT_STRIDE"], 1))
    assert torch.equal(out.reshape(truth.shape), truth)


def test_split_in_every_way_gives_the_same_bits():
    outputs = []
    for split in (1, 2, 3, 7):
        tensors, values = linear_case(per_image=20, inner=400, outer=20, SPLIT_K=split)
        outputs.append(check("qlinear", tensors, values)["out"].view(torch.int32))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_roles_are_those_of_the_convolution_without_borders():
    roles = kernel("qlinear").roles
    assert roles == tuple(r for r in kernel("qconv2d").roles if r not in ("pad", "pad2"))
    assert kernel("qlinear").grid({"O": 17, "rows": 9, "BLOCK_M": 16, "BLOCK_N": 8, "SPLIT_K": 2}) == (4, 1, 2)
