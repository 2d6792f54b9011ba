import pytest
import torch

from edadm_compile.kernels import layernorm
from edadm_compile.kernels.launch import Tile
from tests.kernels import launching
from tests.kernels.launching import UNIT, check_codes, check_floats, poisoned, post, run_reference, run_triton, strided

U = UNIT[torch.float32]
EPS = 1e-5

CASES = {
    # rows, channels, (BLOCK_R, BLOCK_C)
    "one value": (1, 1, (1, 1)),
    "one row": (1, 7, (4, 8)),
    "odd": (5, 13, (2, 32)),
    "power of two": (6, 64, (4, 64)),
    "real": (9, 320, (4, 512)),
    "wide": (3, 1280, (1, 2048)),
}


def build(name, dtype=torch.float32, zero=-11, affine=(True, True), **extra):
    rows, channels, sizes = CASES[name]
    generator = torch.Generator().manual_seed(channels)
    tensors = {
        "x": strided(1, rows, channels, channels + 3, dtype, channels)[0],
        "weight": torch.randn(channels, generator=generator),
        "bias": torch.randn(channels, generator=generator),
        "post": post(0.03, zero),
        "out": poisoned((rows + 1, channels + 5), dtype)[:rows, :channels],
        "out_q": poisoned((rows + 1, channels + 2), torch.int8)[:rows, :channels],
    }
    for role, present in zip(("weight", "bias"), affine, strict=True):
        if not present:
            tensors.pop(role)
    constants = {
        "C": channels, "X_STRIDE": channels + 3, "EPS": EPS, "OUT": True, "OUT_STRIDE": channels + 5,
        "OUT_Q_STRIDE": channels + 2, "HAS_WEIGHT": affine[0], "HAS_BIAS": affine[1], **extra,
    }  # fmt: skip
    return tensors, constants, {"rows": rows}, Tile(dict(zip(("BLOCK_R", "BLOCK_C"), sizes, strict=True)))


def check(tensors, constants):
    x = tensors["x"].double()
    weight = tensors["weight"].double() if "weight" in tensors else torch.ones(x.shape[1]).double()
    bias = tensors["bias"].double() if "bias" in tensors else torch.zeros(x.shape[1]).double()
    mean = x.mean(dim=1, keepdim=True)
    rstd = (((x - mean) ** 2).mean(dim=1, keepdim=True) + EPS) ** -0.5
    v = (x - mean) * rstd * weight + bias
    error = U * (16 * x.abs().amax(dim=1, keepdim=True) * rstd * weight.abs() + 2 * bias.abs())
    check_floats(tensors["out"], v, error)
    check_codes(tensors["out_q"], v, error, tensors["post"], constants.get("QMIN", -128), constants.get("QMAX", 127))
    for role in ("out", "out_q"):
        rows, channels = tensors[role].shape
        whole = tensors[role]._base
        assert launching.untouched(whole[rows:]) and launching.untouched(whole[:rows, channels:])


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("name", list(CASES))
def test_kernel(name, run):
    tensors, constants, scalars, tile = build(name)
    run("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("exactly", [False, True])
def test_store_types(dtype, exactly):
    tensors, constants, scalars, tile = build("odd", dtype, EXACT=exactly)
    run_triton("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)])
def test_without_affine(affine, run):
    tensors, constants, scalars, tile = build("odd", affine=affine)
    run("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-128, 127, -128), (-128, 127, 127), (-8, 7, 3), (-2, 1, 0)])
def test_code_ranges(qmin, qmax, zero):
    tensors, constants, scalars, tile = build("real", zero=zero, QMIN=qmin, QMAX=qmax)
    run_triton("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)


def test_large_mean():
    tensors, constants, scalars, tile = build("real")
    tensors["x"].add_(200)
    run_triton("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)


def test_only_one_output():
    for absent, constant in (("out", "OUT"), ("out_q", "OUT_Q")):
        whole, constants, scalars, tile = build("odd")
        run_triton("layernorm", whole, constants, scalars, tile)
        tensors, constants, scalars, tile = build("odd", **{constant: False})
        tensors.pop(absent)
        run_triton("layernorm", tensors, constants, scalars, tile)
        kept = "out" if absent == "out_q" else "out_q"
        assert torch.equal(tensors[kept], whole[kept])


@pytest.mark.parametrize("name", list(CASES))
def test_chosen_tile(name):
    tensors, constants, scalars, _ = build(name)
    tile = layernorm.choose({**layernorm.KERNEL.constants, **constants, **scalars})
    run_triton("layernorm", tensors, constants, scalars, tile)
    check(tensors, constants)
