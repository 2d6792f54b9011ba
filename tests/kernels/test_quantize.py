import pytest
import torch

from edadm_compile.kernels import quantize
from edadm_compile.kernels.launch import Tile
from edadm_compile.quant import affine
from tests.kernels.launching import (
    ASM,
    SENTINEL,
    UNIT,
    check_codes,
    check_floats,
    poisoned,
    post,
    run_reference,
    run_triton,
)
from tests.kernels.launching import untouched as untouched_memory

U = UNIT[torch.float32]

SHAPES = {
    # batch, pixels, channels, channels of the code buffer, (BLOCK_P, BLOCK_C)
    "one": (1, 1, 1, 1, (1, 1)),
    "odd": (2, 7, 5, 5, (4, 4)),
    "padded": (2, 9, 3, 16, (4, 16)),
    "padded past a block": (1, 6, 5, 16, (8, 4)),
    "wide": (3, 35, 40, 40, (16, 32)),
    "image": (2, 256, 4, 16, (64, 16)),
}


def values(name, dtype, spread=2.0):
    batch, pixels, channels, *_ = SHAPES[name]
    generator = torch.Generator().manual_seed(pixels)
    return (torch.randn(batch, pixels, channels, generator=generator) * spread).to(dtype)


def build(name, layout="nhwc", dtype=torch.float32, scale=0.05, zero=-7, x=None, **extra):
    batch, pixels, channels, padded, sizes = SHAPES[name]
    x = values(name, dtype) if x is None else x
    if layout == "nchw":
        x = x.permute(0, 2, 1).contiguous().permute(0, 2, 1)
    elif layout == "gaps":
        memory = poisoned((batch, pixels, 2 * channels + 1), dtype)
        memory[..., : 2 * channels : 2] = x
        x = memory[..., : 2 * channels : 2]
    tensors = {
        "x": x,
        "post": post(scale, zero),
        "out": poisoned((batch + 1, pixels, channels + 3), dtype)[:batch, :, :channels],
        "out_q": poisoned((batch + 1, pixels, padded), torch.int8)[:batch],
    }
    strides = dict(zip(("X_BATCH", "X_PIXEL", "X_CHANNEL"), x.stride(), strict=True))
    constants = {
        **strides, "HW": pixels, "C": channels, "OUT": True, "OUT_STRIDE": channels + 3, "OUT_Q_STRIDE": padded, **extra
    }  # fmt: skip
    if constants.get("TERMS") == 2:
        tensors["out_q_lo"] = poisoned((batch + 1, pixels, padded), torch.int8)[:batch]
    return tensors, constants, {"batch": batch}, Tile(dict(zip(("BLOCK_P", "BLOCK_C"), sizes, strict=True)))


def untouched(tensors, constants):
    batch, _, channels = tensors["x"].shape
    for role in {"out", "out_q", "out_q_lo"} & {*tensors}:
        assert untouched_memory(tensors[role]._base[batch:])
    assert untouched_memory(tensors["out"]._base[:, :, channels:])
    for role in {"out_q", "out_q_lo"} & {*tensors}:
        assert bool((tensors[role][..., channels:] == 0).all())


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("layout", ["nhwc", "nchw", "gaps"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_exact_codes(name, layout, run):
    """Without an activation and with IEEE division every code and every copied value is the reference's."""
    tensors, constants, scalars, tile = build(name, layout, EXACT=True)
    run("quantize", tensors, constants, scalars, tile)
    x, channels = tensors["x"], constants["C"]
    wanted = affine.quantize(x.float(), tensors["post"][0], tensors["post"][1], -128, 127)
    assert torch.equal(tensors["out_q"][..., :channels].float(), wanted)
    assert torch.equal(tensors["out"], x)
    untouched(tensors, constants)


@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-128, 127, -128), (-128, 127, 127), (-8, 7, 3), (-2, 1, 0)])
def test_code_ranges(qmin, qmax, zero, dtype, exactly):
    tensors, constants, scalars, tile = build("wide", dtype=dtype, zero=zero, QMIN=qmin, QMAX=qmax, EXACT=exactly)
    run_triton("quantize", tensors, constants, scalars, tile)
    x = tensors["x"]
    if exactly:
        wanted = affine.quantize(x.float(), tensors["post"][0], tensors["post"][1], qmin, qmax)
        assert torch.equal(tensors["out_q"].float(), wanted)
    else:
        check_codes(tensors["out_q"], x.double(), torch.zeros(x.shape), tensors["post"], qmin, qmax)
    untouched(tensors, constants)


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("exactly", [False, True])
def test_ties_and_extremes(exactly, asm):
    """Halves go to the even code before the zero point is added; infinities and huge values saturate."""
    ties = torch.arange(-140, 140) + 0.5
    huge = torch.tensor(
        [3e38, -3e38, float("inf"), float("-inf"), 1e6 + 0.5, -1e6, 8e6, -8e6, 1.3e7, -1.3e7, -2e7, 0.0]
    )
    x = torch.cat((ties, -ties, huge, -huge, torch.zeros(4)))
    tensors, constants, _, tile = build(
        "wide", x=torch.zeros(1, 1, 1), scale=1.0, zero=5, EXACT=exactly, ASM=asm, OUT=False
    )
    tensors["x"], tensors["out_q"] = x.reshape(1, -1, 1), poisoned((1, len(x), 1), torch.int8)
    constants |= {"HW": len(x), "C": 1, "X_BATCH": len(x), "X_PIXEL": 1, "X_CHANNEL": 1, "OUT_Q_STRIDE": 1}
    run_triton("quantize", tensors, constants, {"batch": 1}, tile)
    assert torch.equal(tensors["out_q"].flatten().float(), torch.clamp(torch.round(x) + 5, -128, 127))


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("name", ["odd", "padded", "padded past a block", "wide"])
def test_two_terms(name, run):
    tensors, constants, scalars, tile = build(
        name, "nchw", scale=1e-4, zero=0, TERMS=2, QMIN=-32768, QMAX=32639, EXACT=True
    )
    run("quantize", tensors, constants, scalars, tile)
    code = affine.quantize(tensors["x"], tensors["post"][0], tensors["post"][1], -32768, 32639).to(torch.int16)
    assert int(code.max()) > 10000 and int(code.min()) < -10000
    for role, term in zip(("out_q", "out_q_lo"), affine.split_hi_lo(code), strict=True):
        assert torch.equal(tensors[role][..., : constants["C"]], term)
    untouched(tensors, constants)


@pytest.mark.parametrize("act", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize("asm", ASM)
def test_activations(act, exactly, asm):
    x = values("wide", torch.float32, 4.0)
    tensors, constants, scalars, tile = build("wide", x=x, ACT=act, EXACT=exactly, ASM=asm)
    run_triton("quantize", tensors, constants, scalars, tile)
    x = tensors["x"].double()
    wanted = quantize.activation(x, act)
    # exp, division and products, each a few roundings; erf and tanh near -1 lose relative but not absolute accuracy
    error = (2.0**-11 if asm and not exactly and act in (1, 3) else 8 * U) * x.abs() * (act != 0)
    check_floats(tensors["out"], wanted, error)
    check_codes(tensors["out_q"], wanted, error, tensors["post"])


def test_extreme_activations():
    """No NaN where the exponential overflows."""
    x = torch.tensor([-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4]).reshape(1, 7, 1)
    for act in (1, 2, 3, 4):
        tensors, constants, _, tile = build("one", x=x, ACT=act)
        tensors["out"], tensors["out_q"] = poisoned((1, 7, 1), torch.float32), poisoned((1, 7, 1), torch.int8)
        constants |= {"HW": 7, "OUT_STRIDE": 1}
        run_triton("quantize", tensors, constants, {"batch": 1}, tile)
        check_floats(tensors["out"], quantize.activation(x.double(), act), 8 * U * x.double().abs())


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_chosen_tile(name, layout):
    tensors, constants, scalars, _ = build(name, layout, EXACT=True)
    tile = quantize.choose({**quantize.KERNEL.constants, **constants, **scalars})
    run_triton("quantize", tensors, constants, scalars, tile)
    wanted = affine.quantize(tensors["x"].float(), tensors["post"][0], tensors["post"][1], -128, 127)
    assert torch.equal(tensors["out_q"][..., : constants["C"]].float(), wanted)
    untouched(tensors, constants)


def test_only_values():
    tensors, constants, scalars, tile = build("odd", ACT=4, OUT_Q=False)
    run_triton("quantize", tensors, constants, scalars, tile)
    assert torch.equal(tensors["out"], tensors["x"].relu())
    assert bool((tensors["out_q"] == SENTINEL).all())


def test_unknown_activation():
    with pytest.raises(ValueError, match="0 to 4"):
        quantize.activation(torch.zeros(1), 5)
