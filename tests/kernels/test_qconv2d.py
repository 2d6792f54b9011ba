import json
import os
import subprocess
import sys

import pytest
import torch

from edadm_compile.kernels import constants, reference
from edadm_compile.kernels.registry import kernel
from edadm_compile.quant import affine, packing
from tests.kernels.matmul_cases import add_segment, before_activation, check, conv_case, reals, weight

#: Interpreter of Triton 3.6: bounds of a split loop are arrays of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")

GEOMETRY = {
    "size one": {"inner": 1, "outer": 1, "size": (1, 1), "window": (1, 1), "sides": (0, 0, 0, 0)},
    "one pixel padded": {"inner": 3, "outer": 2, "size": (1, 1)},
    "same": {"batch": 2, "inner": 17, "outer": 19},
    "stride two": {"batch": 2, "inner": 4, "size": (7, 8), "stride": (2, 2), "sides": (0, 1, 0, 1)},
    "uneven": {"inner": 3, "size": (9, 7), "window": (1, 3), "stride": (2, 1), "sides": (0, 0, 1, 1)},
    "dilated": {"size": (9, 9), "sides": (2, 2, 2, 2), "dilation": (2, 2)},
    "no border": {"batch": 3, "inner": 65, "size": (4, 4), "sides": (0, 0, 0, 0)},
    "border below only": {"size": (4, 5), "sides": (0, 2, 0, 0)},
    "upsampled": {"batch": 2, "inner": 70, "size": (3, 4), "upsample": 2},
    "upsampled pointwise": {"size": (3, 3), "window": (1, 1), "sides": (0, 0, 0, 0), "upsample": 2},
    "wide halo": {"inner": 2, "size": (3, 3), "window": (5, 5), "sides": (4, 4, 4, 4)},
    "prime": {"batch": 3, "inner": 67, "outer": 37, "size": (7, 5)},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(GEOMETRY))
def test_geometry(name, bits):
    check("qconv2d", *conv_case(**GEOMETRY[name], bits=bits))


@pytest.mark.parametrize("pad", [-128, 127, 0])
def test_code_of_zero(pad):
    check("qconv2d", *conv_case(batch=2, inner=9, pad=pad))


FLAGS = {
    "row": {"ROW": True},
    "residual": {"RESIDUAL": True},
    "row residual relu codes": {"ROW": True, "RESIDUAL": True, "ACT": 4, "OUT_Q": True},
    "codes only": {"OUT": False, "OUT_Q": True},
    "codes of a range": {"OUT_Q": True, "QMIN": -8, "QMAX": 7},
    "codes exact": {"OUT_Q": True, "EXACT": True},
    "nchw": {"OUT_NCHW": True, "OUT_Q": True},
    "two sources": {"inner2": 66, "bits2": 4},
    "two sources codes": {"inner2": 3, "bits": 4, "OUT_Q": True, "RESIDUAL": True},
    "split": {"inner": 130, "SPLIT_K": 4},
    "split more than steps": {"inner": 3, "window": (1, 1), "sides": (0, 0, 0, 0), "SPLIT_K": 3, "bits": 4},
    "split two sources": {"inner": 70, "inner2": 130, "SPLIT_K": 5, "OUT_Q": True, "ROW": True},
    "wide tile": {"inner": 33, "outer": 40, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "OUT_Q": True},
}


@pytest.mark.parametrize("name", list(FLAGS))
def test_epilogue(name):
    check("qconv2d", *conv_case(**{"batch": 2, **FLAGS[name]}))


@pytest.mark.parametrize("flags", [{}, {"ROW": True, "RESIDUAL": True}, {"SPLIT_K": 2, "inner2": 3}])
def test_statistics(flags):
    check("qconv2d", *conv_case(batch=2, size=(8, 6), STATS=True, **flags))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # x / inf is the zero that is meant
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("act", [1, 2, 3])
def test_activations(act, exact):
    # exp and erf of NumPy and of torch differ by a few roundings; 1 + erf cancels where x is negative
    case = conv_case(ACT=act, OUT_Q=True, EXACT=exact)
    check("qconv2d", *case, ulps=4, magnitude=before_activation("qconv2d", *case))


@pytest.mark.parametrize(("store", "ulps"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_store_types(store, ulps):
    # Triton's interpreter cuts where the device rounds to bfloat16
    check("qconv2d", *conv_case(batch=2, inner=20, RESIDUAL=True, OUT_Q=True, store=store), ulps=ulps)


@pytest.mark.parametrize("flags", [{}, {"bits": 4, "SPLIT_K": 2}, {"inner2": 9, "SPLIT_K": 2}])
def test_glu(flags):
    case = conv_case(window=(1, 1), sides=(0, 0, 0, 0), outer=18, GLU=True, **flags)
    check("qconv2d", *case, ulps=4, magnitude=before_activation("qconv2d", *case))


def test_layer_of_stable_diffusion_cut_down():
    tile = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64}
    check("qconv2d", *conv_case(batch=2, inner=320, outer=64, size=(8, 8), bits=4, ROW=True, OUT_Q=True, **tile))


def _truth_case(bits, act_bits):
    """A 3 x 3 layer of the integer dialect, and its launch: one term, or the two of 16-bit codes."""
    shape, size, pad = (9, 5, 3, 3), (6, 5), (11 if act_bits == 8 else 0)
    low, high = (-128, 128) if act_bits == 8 else (-32768, 32640)
    x = torch.randint(low, high, (2, 5, *size), generator=torch.Generator().manual_seed(3))
    x = x.to(torch.int8 if act_bits == 8 else torch.int16)
    w = weight(shape, bits, 4)
    multiplier, bias = reals(9, 5).abs() * 1e-3, reals(9, 6)
    truth = torch.ops.edadm.qconv2d(
        x, packing.pack(w, bits), multiplier, bias, pad, [1, 1], [1, 1], [1, 1], 1, bits, list(shape)
    )
    tensors, values = conv_case(batch=2, inner=5, outer=9, size=size, bits=bits, pad=pad, OUT_NCHW=True)
    terms = reference.terms(x)
    device = torch.device("cpu")
    for number, term, factor in zip(("", "2")[: len(terms)], terms, (256.0, 1.0)[-len(terms) :], strict=True):
        add_segment(tensors, values, number, term.permute(0, 2, 3, 1).reshape(-1, 5), w, bits, 0, pad=pad)
        tensors[f"multiplier{number}"] = constants.vector([multiplier], device, length=16, factor=factor)
        tensors[f"bias{number}"] = constants.vector([bias] if factor == 1 else [], device, length=16)
    values["SEGMENTS"] = len(terms)
    return tensors, values, truth


@pytest.mark.parametrize("act_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_integer_dialect_bit_for_bit(bits, act_bits):
    tensors, values, truth = _truth_case(bits, act_bits)
    result = check("qconv2d", tensors, values)
    assert torch.equal(result["out"].reshape(truth.shape), truth)


def test_codes_are_those_of_the_affine_map():
    tensors, values = conv_case(batch=2, outer=32, OUT_Q=True, EXACT=True)
    scale, zero, _ = tensors["post"]
    result = check("qconv2d", tensors, values)
    view = ((values["pixels"], values["O"]), (values["OUT_STRIDE"], 1))
    expected = affine.quantize(result["out"].as_strided(*view), scale, zero, -128, 127)
    assert len(expected.unique()) > 50
    assert torch.equal(result["out_q"].as_strided(*view).float(), expected)


def test_ties_round_to_even_and_huge_values_clamp():
    tensors, values = conv_case(
        inner=1, outer=1, size=(1, 8), window=(1, 1), sides=(0, 0, 0, 0), RESIDUAL=True, OUT_Q=True
    )
    tensors["multiplier"].zero_()
    tensors["bias"].zero_()
    tensors["post"] = torch.tensor([1.0, 3.0, 1.0])
    wanted = {0.5: 3, 1.5: 5, 2.5: 5, -0.5: 3, -1.5: 1, 1e30: 127, -1e30: -128, 123.49: 126}
    tensors["residual"][:, 0] = torch.tensor(list(wanted))
    result = check("qconv2d", tensors, values)
    assert result["out_q"].as_strided((8,), (values["OUT_Q_STRIDE"],)).tolist() == list(wanted.values())


_COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from edadm_compile.kernels.registry import kernel
name, arch, values, types, warps = json.loads(sys.argv[1])
found = kernel(name)
function = found.function()
signature, constexprs, attributes = {}, {}, {}
for i, argument in enumerate(function.arg_names):
    role = argument.removesuffix("_ptr")
    if role in types:
        signature[argument], attributes[i,] = types[role], [["tt.divisibility", 16]]
    elif argument in found.scalars:
        signature[argument] = "i32"
    else:
        signature[argument], constexprs[i,] = "constexpr", values.get(argument)
source = ASTSource(function, signature, constexprs, attributes)
options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
assembly = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
print(json.dumps(assembly["ptx"]))
"""
_POINTERS = {
    "int8": "*i8", "uint8": "*u8", "float32": "*fp32", "float16": "*fp16", "int32": "*i32",
}  # fmt: skip


def compile_ptx(name, tensors, values, arch, tmp_path):
    """PTX of a launch, from a process in which Triton compiles instead of interpreting."""
    types = {role: _POINTERS[str(t.dtype).removeprefix("torch.")] for role, t in tensors.items()}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", _COMPILE, json.dumps([name, arch, values, types, 4])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("arch", "bits"), [(80, 8), (90, 4), (90, 8)])
def test_it_compiles_to_wide_asynchronous_loads(arch, bits, tmp_path):
    flags = {"RESIDUAL": True, "OUT_Q": True, "STATS": True, "ASM": bits == 4}
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    tensors, values = conv_case(inner=64, outer=64, size=(8, 8), bits=bits, store=torch.float16, **tile, **flags)
    ptx = compile_ptx(
        "qconv2d", tensors, values | {"OUT_STRIDE": 64, "OUT_Q_STRIDE": 64, "RES_STRIDE": 64}, arch, tmp_path
    )
    assert "cp.async.cg.shared.global" in ptx and "st.shared.b8" not in ptx and "ld.global.b8" not in ptx
    assert ("wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8" if arch == 90 else "mma.sync.aligned.m16n8k32") in ptx


def test_grid_counts_tiles():
    values = {"O": 33, "BLOCK_M": 16, "pixels": 130, "BLOCK_N": 64, "SPLIT_K": 5}
    assert kernel("qconv2d").grid(values) == (3 * 3, 1, 5)
