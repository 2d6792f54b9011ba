import pytest
import torch

from edadm_compile.kernels import attention
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.reference import matmul_accumulator
from edadm_compile.quant import affine
from edadm_compile.quant.spec import act_spec
from tests.kernels import launching
from tests.kernels.launching import ASM, UNIT, check_codes, check_floats, poisoned, post, run_reference, run_triton

U = UNIT[torch.float32]

CASES = {
    # batch, heads, LQ, LK, D, (BLOCK_Q, BLOCK_KV)
    "one": (1, 1, 1, 1, 1, (16, 32)),
    "one key": (1, 2, 5, 1, 8, (16, 32)),
    "odd": (2, 3, 17, 37, 40, (16, 32)),
    "whole": (1, 1, 32, 64, 32, (16, 32)),
    "cross": (1, 2, 20, 77, 40, (32, 64)),
    "wide head": (1, 1, 9, 33, 160, (16, 32)),
    "widest head": (1, 1, 16, 32, 256, (16, 32)),
}
ZEROS = {"symmetric": (0, 0, 0), "asymmetric": (-31, 17, 120), "extreme": (-128, 127, -128)}


def codes(batch, length, heads, size, gap, seed):
    """int8 [batch, length, heads, size]; between rows and heads lie other codes."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randint(-128, 128, (batch, length, heads, size + gap), generator=generator).to(torch.int8)
    return memory[..., :size]


def build(name, zeros="asymmetric", p_codes=True, dtype=torch.float32, bits=8, **extra):
    batch, heads, lq, lk, size, sizes = CASES[name]
    tensors, constants = {}, {}
    for seed, (role, length) in enumerate((("q", lq), ("k", lk), ("v", lk))):
        x = codes(batch, length, heads, size, 3 * seed, 10 * size + seed)
        tensors[role] = x
        constants |= dict(zip((f"{role.upper()}_{n}" for n in ("BATCH", "ROW", "HEAD")), x.stride(), strict=False))
    zero_q, zero_k, zero_v = ZEROS[zeros]
    spec = act_spec(bits)
    # scores of a few units: a softmax that is neither uniform nor a single one
    qk_scale = 2.5 / (73 * 73 * size**0.5)
    s_p = 1 / (spec.qmax - spec.qmin)
    tensors |= {
        "params": torch.tensor([qk_scale, zero_q, zero_k, 0.02, zero_v, s_p, spec.qmin], dtype=torch.float32),
        "post": post(0.01, 9),
        "out": poisoned((batch + 1, lq, heads * size + 3), dtype)[:batch, :, : heads * size],
        "out_q": poisoned((batch + 1, lq, heads * size + 5), torch.int8)[:batch, :, : heads * size],
    }
    constants |= {
        "LQ": lq, "LK": lk, "HEADS": heads, "D": size, "P_CODES": p_codes, "PMIN": spec.qmin, "PMAX": spec.qmax,
        "OUT_STRIDE": heads * size + 3, "OUT_Q": True, "OUT_Q_STRIDE": heads * size + 5, "EXACT": True, **extra,
    }  # fmt: skip
    return tensors, constants, {"batch": batch}, Tile(dict(zip(("BLOCK_Q", "BLOCK_KV"), sizes, strict=True)))


def exact(tensors, constants):
    """float64 result [B, LQ, HEADS * D] with the probabilities as they are used, and an error bound.

    A float32 probability is off by the rounding of the score (|score| * U twice), of exp and of the division. With codes
    this moves a code by at most one, and only where the exact one lies that close to a boundary.
    """
    params = tensors["params"].double()
    q, k, v = (tensors[n].permute(0, 2, 1, 3) for n in ("q", "k", "v"))
    integers = matmul_accumulator(q, k.transpose(-2, -1), int(params[1]), int(params[2])).double()
    scores = integers * params[0]
    p = torch.softmax(scores, -1)
    relative = U * (8 + 8 * scores.abs().amax(dim=-1, keepdim=True))
    values = v.double() - params[4]
    if constants["P_CODES"]:
        bounds = constants["PMIN"], constants["PMAX"]
        low, middle, high = (
            affine.quantize(p * (1 + sign * relative), params[5], params[6], *bounds) for sign in (-1, 0, 1)
        )
        assert float((low != high).double().mean()) < 0.02
        result = (middle - params[6]) @ values
        error = (high - low) @ values.abs() + 3 * U * result.abs()
        scale = params[5] * params[3]
    else:
        result, scale = p @ values, params[3]
        error = (UNIT[torch.float16] * 2 + relative) * (p @ values.abs()) + 2.0**-24 * values.abs().sum(
            -2, keepdim=True
        )
    shape = tensors["out"].shape
    return (result * scale).permute(0, 2, 1, 3).reshape(shape), (error * scale).permute(0, 2, 1, 3).reshape(shape)


def check(tensors, constants, undecided=0.05):
    v, error = exact(tensors, constants)
    check_floats(tensors["out"], v, error)
    check_codes(tensors["out_q"], v, error, tensors["post"], undecided=undecided)
    for role in ("out", "out_q"):
        batch, _, channels = tensors[role].shape
        whole = tensors[role]._base
        assert launching.untouched(whole[batch:]) and launching.untouched(whole[:batch, :, channels:])


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("name", list(CASES))
def test_codes_of_probabilities(name, run):
    tensors, constants, scalars, tile = build(name)
    run("attention", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("zeros", list(ZEROS))
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("exactly", [False, True])
def test_zero_points(zeros, bits, exactly):
    tensors, constants, scalars, tile = build("odd", zeros, bits=bits, EXACT=exactly)
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("zeros", list(ZEROS))
@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("name", list(CASES))
def test_fast(name, zeros, asm):
    tensors, constants, scalars, tile = build(name, zeros, p_codes=False, EXACT=False, ASM=asm)
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants, undecided=0.5)


def test_fast_reference():
    tensors, constants, scalars, tile = build("odd", p_codes=False)
    run_reference("attention", tensors, constants, scalars, tile)
    check(tensors, constants, undecided=0.5)


@pytest.mark.parametrize("p_codes", [False, True])
def test_promised_zero_points(p_codes):
    """Without the corrections the result is the same when the zero points are 0, and wrong when they are not."""
    promise = {"ZERO_Q": False, "ZERO_K": False, "ZERO_V": False}
    tensors, constants, scalars, tile = build("odd", "symmetric", p_codes, **promise)
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants, undecided=0.5)
    tensors, constants, scalars, tile = build("odd", "extreme", p_codes, **promise)
    run_triton("attention", tensors, constants, scalars, tile)
    with pytest.raises(AssertionError):
        check(tensors, constants, undecided=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p_codes", [False, True])
def test_store_types(dtype, p_codes):
    tensors, constants, scalars, tile = build("odd", p_codes=p_codes, dtype=dtype)
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants, undecided=0.5)


@pytest.mark.parametrize("p_codes", [False, True])
def test_peaked_softmax(p_codes):
    """One key takes everything: the running maximum must rescale what came before."""
    tensors, constants, scalars, tile = build("odd", p_codes=p_codes)
    tensors["params"][0] *= 400
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants, undecided=0.5)


def test_only_codes():
    tensors, constants, scalars, tile = build("odd", OUT=False)
    del tensors["out"]
    run_triton("attention", tensors, constants, scalars, tile)
    whole, constants, scalars, tile = build("odd")
    run_triton("attention", whole, constants, scalars, tile)
    assert torch.equal(tensors["out_q"], whole["out_q"])


@pytest.mark.parametrize("name", list(CASES))
def test_chosen_tile(name):
    tensors, constants, scalars, _ = build(name)
    tile = attention.choose({**attention.KERNEL.constants, **constants, **scalars})
    run_triton("attention", tensors, constants, scalars, tile)
    check(tensors, constants)
