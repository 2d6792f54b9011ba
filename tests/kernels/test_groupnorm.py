import pytest
import torch

from edadm_compile.kernels import groupnorm
from edadm_compile.kernels.launch import Tile
from tests.kernels import launching
from tests.kernels.launching import (
    ASM,
    UNIT,
    check_codes,
    check_floats,
    poisoned,
    post,
    run_reference,
    run_triton,
    strided,
)

U = UNIT[torch.float32]
EPS = 1e-5

CASES = {
    # batch, pixels, channels, channels2, groups, tile (BLOCK_P, BLOCK_C, BLOCK_G, STEPS), T, T2
    "one pixel": (1, 1, 4, 0, 2, (1, 4, 2, 1), 0, 0),
    "one group": (2, 5, 7, 0, 1, (8, 8, 1, 1), 0, 0),
    "group per channel": (1, 6, 5, 0, 5, (8, 4, 3, 1), 0, 0),
    "chunks": (2, 37, 20, 0, 5, (8, 16, 3, 1), 0, 0),
    "chunks whole": (1, 64, 40, 0, 4, (16, 16, 1, 1), 0, 0),
    "ten of a group": (1, 64, 320, 0, 32, (64, 64, 4, 1), 0, 0),
    "straddle": (2, 16, 256, 128, 32, (16, 32, 2, 1), 0, 0),
    "straddle in chunks": (1, 21, 10, 5, 3, (4, 16, 3, 1), 0, 0),
    "two sources apart": (2, 9, 12, 8, 5, (16, 4, 1, 1), 0, 0),
    "given": (2, 64, 40, 0, 4, (8, 16, 3, 2), 4, 0),
    "given one tile": (1, 12, 24, 0, 6, (16, 32, 6, 1), 1, 0),
    "given many tiles": (1, 96, 16, 0, 4, (32, 16, 4, 4), 96, 0),
    "given in turns": (1, 20, 512, 0, 1, (16, 64, 1, 2), 10, 0),
    "given ten of a group": (1, 256, 320, 0, 32, (32, 64, 8, 4), 4, 0),
    "given straddle": (1, 64, 256, 128, 32, (16, 64, 7, 2), 2, 8),
    "given odd": (3, 35, 21, 14, 5, (8, 16, 4, 3), 5, 7),
}


def moments(x, tiles):
    """float32 [B, tiles, 2, C]: mean and M2 of consecutive pixels of x [B, HW, C]."""
    batch, pixels, channels = x.shape
    parts = x.double().reshape(batch, tiles, pixels // tiles, channels)
    mean = parts.mean(dim=2)
    return torch.stack((mean, ((parts - mean[:, :, None]) ** 2).sum(dim=2)), dim=2).float()


def build(name, dtype=torch.float32, scale=0.03, zero=-11, **extra):
    batch, pixels, c, c2, groups, sizes, t, t2 = CASES[name]
    total, seed = c + c2, len(name)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "x": strided(batch, pixels, c, c + 3, dtype, seed, 0.7),
        "weight": torch.randn(total, generator=generator),
        "bias": torch.randn(total, generator=generator),
        "post": post(scale, zero),
        "out": poisoned((batch + 1, pixels, total + 5), dtype)[:batch, :, :total],
        "out_q": poisoned((batch + 1, pixels, total + 3), torch.int8)[:batch, :, :total],
    }
    constants = {
        "HW": pixels, "C": c, "C2": c2, "X_STRIDE": c + 3, "X2_STRIDE": c2 + 1 if c2 else 0, "GROUPS": groups,
        "EPS": EPS, "OUT": True, "OUT_STRIDE": total + 5, "OUT_Q_STRIDE": total + 3, "T": t, "T2": t2, **extra,
    }  # fmt: skip
    if c2:
        tensors["x2"] = strided(batch, pixels, c2, c2 + 1, dtype, seed + 1, 1.9)
    if t:
        tensors["stats"] = moments(tensors["x"], t)
    if t2:
        tensors["stats2"] = moments(tensors["x2"], t2)
    tile = Tile(dict(zip(("BLOCK_P", "BLOCK_C", "BLOCK_G", "STEPS"), sizes, strict=True)))
    return tensors, constants, {"batch": batch}, tile


def exact(tensors, constants):
    """Result in float64 and the error a float32 computation may have."""
    x = torch.cat([tensors[n].double() for n in ("x", "x2") if n in tensors], dim=2)
    batch, pixels, _ = x.shape
    grouped = x.reshape(batch, pixels, constants["GROUPS"], -1)
    mean = grouped.mean(dim=(1, 3), keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=(1, 3), keepdim=True)
    rstd = ((variance + EPS) ** -0.5).expand_as(grouped).reshape(x.shape)
    mean = mean.expand_as(grouped).reshape(x.shape)
    factor = rstd * tensors["weight"].double()
    v = (x - mean) * factor + tensors["bias"].double()
    # mean: a sum of rounded terms; rstd: relative error; x * factor + (bias - mean * factor): each product and sum
    largest = grouped.abs().amax(dim=(1, 3), keepdim=True).expand_as(grouped).reshape(x.shape)
    error = U * (24 * (largest + x.abs()) * factor.abs() + 4 * tensors["bias"].double().abs())
    if constants.get("ACT") == 1:
        approximate = constants.get("ASM") and not constants.get("EXACT")  # tanh.approx
        v, error = v * torch.sigmoid(v), 1.1 * error + (2.0**-11 if approximate else 8 * U) * v.abs()
    return v, error


def check(tensors, constants):
    v, error = exact(tensors, constants)
    check_floats(tensors["out"], v, error)
    check_codes(tensors["out_q"], v, error, tensors["post"], constants.get("QMIN", -128), constants.get("QMAX", 127))
    for role in ("out", "out_q"):
        whole = tensors[role]._base
        batch, _, channels = tensors[role].shape
        assert launching.untouched(whole[batch:]) and launching.untouched(whole[:batch, :, channels:])


@pytest.mark.parametrize("asm", ASM)
@pytest.mark.parametrize("name", list(CASES))
def test_kernel(name, asm):
    tensors, constants, scalars, tile = build(name, ACT=1, ASM=asm)
    run_triton("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("name", ["chunks", "straddle", "given odd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_store_types(name, dtype):
    tensors, constants, scalars, tile = build(name, dtype, ACT=1, EXACT=True)
    run_triton("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("act", [0, 1])
@pytest.mark.parametrize("exactly", [False, True])
@pytest.mark.parametrize(("qmin", "qmax", "zero"), [(-128, 127, -128), (-128, 127, 127), (-8, 7, 3), (-128, 127, 0)])
def test_codes(act, exactly, qmin, qmax, zero):
    tensors, constants, scalars, tile = build(
        "given odd", scale=0.05, zero=zero, ACT=act, EXACT=exactly, QMIN=qmin, QMAX=qmax
    )
    run_triton("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)


def test_only_one_output():
    for absent, constant in (("out", "OUT"), ("out_q", "OUT_Q")):
        tensors, constants, scalars, tile = build("chunks", **{constant: False})
        tensors.pop(absent)
        run_triton("groupnorm", tensors, constants, scalars, tile)
        v, error = exact(tensors, constants)
        if absent == "out_q":
            check_floats(tensors["out"], v, error)
        else:
            check_codes(tensors["out_q"], v, error, tensors["post"])


@pytest.mark.skipif(launching.GPU, reason="calls the interpreter with a grid of its own")
def test_blocks_keep_to_their_source():
    """The last block of the first source must not write channels of the second: nothing orders the two programs."""
    tensors, constants, scalars, tile = build("given odd", ACT=1)
    entry = groupnorm.KERNEL
    values = {**entry.constants, **constants, **tile.sizes}
    x, _, z = entry.grid({**values, **scalars})
    blocks = -(-constants["C"] // tile.sizes["BLOCK_C"])
    entry.function()[x, blocks, z](*(tensors.get(r) for r in entry.roles), scalars["batch"], **values)
    assert launching.untouched(tensors["out"][..., constants["C"] :])
    assert launching.untouched(tensors["out_q"][..., constants["C"] :])
    assert not bool(tensors["out"][..., : constants["C"]].isnan().any())


@pytest.mark.parametrize("name", ["chunks", "straddle", "given odd"])
def test_reference(name):
    tensors, constants, scalars, tile = build(name, ACT=1)
    run_reference("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize("name", ["chunks", "given odd"])
def test_large_mean(name):
    """A mean of 3000 standard deviations: sums of squares would lose everything."""
    tensors, constants, scalars, tile = build(name)
    tensors["x"].add_(2000)
    if "x2" in tensors:
        tensors["x2"].add_(2000)
    for role, count in (("stats", constants["T"]), ("stats2", constants["T2"])):
        if count:
            tensors[role] = moments(tensors["x2" if role == "stats2" else "x"], count)
    run_triton("groupnorm", tensors, constants, scalars, tile)
    v, error = exact(tensors, constants)
    check_floats(tensors["out"], v, error)


@pytest.mark.parametrize("run", [run_triton, run_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("pixels", "channels", "t", "block_p"), [(1, 1, 1, 1), (35, 21, 5, 4), (64, 40, 2, 64), (96, 16, 96, 1)]
)
def test_moments(pixels, channels, t, block_p, dtype, run):
    x = strided(2, pixels, channels, channels + 3, dtype, 5)
    tensors = {"x": x, "stats": poisoned((3, t, 2, channels), torch.float32)[:2]}
    constants = {"HW": pixels, "C": channels, "X_STRIDE": channels + 3, "T": t, "MOMENTS": True}
    tile = Tile({"BLOCK_P": block_p, "BLOCK_C": 16, "BLOCK_G": 1, "STEPS": 1})
    run("groupnorm", tensors, constants, {"batch": 2}, tile)
    exact_moments = moments(x, t).double()
    largest = x.double().abs().amax(dim=(0, 1))
    assert bool(((tensors["stats"] - exact_moments).abs()[:, :, 0] <= 8 * U * largest).all())
    # M2: deviations carry the error of the mean, of x and their own
    m2 = exact_moments[:, :, 1]
    assert bool(((tensors["stats"][:, :, 1] - m2).abs() <= 32 * U * (m2 + largest * (m2 * pixels / t).sqrt())).all())
    assert launching.untouched(tensors["stats"]._base[2:])


def test_moments_feed_the_other_launch():
    """A chain of MOMENTS and T > 0 at the chosen tiles gives the normalised values."""
    tensors, constants, scalars, _ = build("given ten of a group", ACT=1)
    tensors["stats"] = poisoned((1, 8, 2, 320), torch.float32)
    first = {"HW": 256, "C": 320, "X_STRIDE": 323, "T": 8, "MOMENTS": True}
    constants["T"] = 8
    given = {role: tensors[role] for role in ("x", "stats")}
    tile = groupnorm.choose({**groupnorm.KERNEL.constants, **first, **scalars})
    run_triton("groupnorm", given, first, scalars, tile)
    tile = groupnorm.choose({**groupnorm.KERNEL.constants, **constants, **scalars})
    run_triton("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)


@pytest.mark.parametrize(("pixels", "t"), [(64, 0), (1024, 8), (4096, 32), (1225, 25), (1031, 0)])
def test_parts(pixels, t):
    assert groupnorm.parts(pixels) == t


def test_statistics_are_used():
    """With T > 0 the moments come from the operand, not from the data."""
    tensors, constants, scalars, tile = build("given")
    tensors["stats"][:, :, 1] *= 4
    run_triton("groupnorm", tensors, constants, scalars, tile)
    v, error = exact(tensors, constants)
    with pytest.raises(AssertionError):
        check_floats(tensors["out"], v, error)


LAYERS = [
    # pixels, channels, channels2, groups, T, T2
    (4096, 320, 0, 32, 64, 0), (4096, 320, 640, 32, 64, 32), (64, 1280, 1280, 32, 0, 0), (256, 256, 128, 32, 0, 0),
    (1024, 128, 0, 32, 16, 0), (65536, 224, 0, 32, 512, 0), (64, 4, 0, 4, 0, 0), (1, 512, 0, 32, 0, 0),
    (4096, 320, 0, 32, 0, 0), (16, 1024, 0, 1, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("pixels", "c", "c2", "groups", "t", "t2"), LAYERS)
def test_chosen_tile_covers_everything(batch, pixels, c, c2, groups, t, t2):
    values = {**groupnorm.KERNEL.constants, "HW": pixels, "C": c, "C2": c2, "GROUPS": groups, "T": t, "T2": t2}
    values["batch"] = batch
    tile = groupnorm.choose(values)
    values |= tile.sizes
    x, y, z = groupnorm.grid(values)
    per_group = (c + c2) // groups
    assert z == batch and tile.sizes["BLOCK_P"] * tile.sizes["BLOCK_C"] <= 16384
    if t:
        assert (x - 1) * values["BLOCK_P"] * values["STEPS"] < pixels <= x * values["BLOCK_P"] * values["STEPS"]
        assert values["BLOCK_G"] == groupnorm.touched_groups(c, c2, groups, values["BLOCK_C"])
    else:
        assert x == 1 and y * values["BLOCK_G"] >= groups
        assert values["BLOCK_C"] >= min(groups, values["BLOCK_G"]) * per_group


@pytest.mark.parametrize(("name", "t"), [("ten of a group", 0), ("given straddle", 2), ("given odd", 5)])
def test_chosen_tile_runs(name, t):
    tensors, constants, scalars, _ = build(name, ACT=1)
    tile = groupnorm.choose({**groupnorm.KERNEL.constants, **constants, **scalars})
    run_triton("groupnorm", tensors, constants, scalars, tile)
    check(tensors, constants)
