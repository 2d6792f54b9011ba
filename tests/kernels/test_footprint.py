"""What a plan check believes of a kernel against the addresses that the kernel uses."""

import dataclasses
import os
import random

import pytest
import torch

from benchmarks.robustness.touched import TooLong, touched
from benchmarks.robustness.values import wrong
from edadm_compile.errors import ArtifactError
from edadm_compile.kernels import tiles
from edadm_compile.kernels.footprint import reach
from edadm_compile.kernels.launch import Launch, Operand, Tile
from edadm_compile.kernels.registry import kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")

CONV = {"H": 5, "W": 6, "C": 20, "X_STRIDE": 32, "KH": 3, "KW": 3, "PAD_T": 1, "PAD_L": 1, "OH": 5, "OW": 6, "O": 10,
        "KC": 32, "OUT_STRIDE": 10}  # fmt: skip
LINEAR = {"C": 40, "X_STRIDE": 48, "O": 24, "KC": 64, "OUT_STRIDE": 24, "ROWS_PER_IMAGE": 7}
NORM = {"HW": 20, "C": 12, "X_STRIDE": 12, "GROUPS": 3, "OUT": True, "OUT_STRIDE": 16, "OUT_Q_STRIDE": 16}
HEADS = {"LQ": 9, "LK": 70, "HEADS": 2, "D": 20, "Q_BATCH": 360, "Q_ROW": 40, "Q_HEAD": 20, "K_BATCH": 2800, "K_ROW": 40,
         "K_HEAD": 20, "V_BATCH": 2800, "V_ROW": 40, "V_HEAD": 20, "OUT_STRIDE": 40}  # fmt: skip
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32, "SPLIT_K": 1}
CASES = {
    "convolution": ("qconv2d", CONV, {"pixels": 60}, SMALL),
    "strided": ("qconv2d", {**CONV, "STRIDE_H": 2, "STRIDE_W": 2, "OH": 3, "OW": 3}, {"pixels": 18}, SMALL),
    "1x1 without a border": ("qconv2d", {**CONV, "KH": 1, "KW": 1, "PAD_T": 0, "PAD_L": 0}, {"pixels": 60}, SMALL),
    "upsampled, dilated": ("qconv2d", {**CONV, "UPSAMPLE": 2, "DIL_H": 2, "OH": 8, "OW": 12}, {"pixels": 96}, SMALL),
    "split, 4 bits": (
        "qconv2d", {**CONV, "BITS": 4, "KC": 64}, {"pixels": 60}, {**SMALL, "BLOCK_K": 64, "SPLIT_K": 3},
    ),
    "two segments, codes": (
        "qconv2d",
        {**CONV, "SEGMENTS": 2, "C2": 7, "X2_STRIDE": 16, "KC2": 32, "OUT_Q": True, "OUT_Q_STRIDE": 16},
        {"pixels": 60}, SMALL,
    ),
    "planes": ("qconv2d", {**CONV, "OUT_NCHW": True, "OUT_STRIDE": 0}, {"pixels": 60}, SMALL),
    "statistics": (
        "qconv2d", {**CONV, "H": 4, "W": 4, "OH": 4, "OW": 4, "STATS": True}, {"pixels": 32}, SMALL,
    ),
    "linear, row, residual": (
        "qlinear", {**LINEAR, "ROW": True, "ROW_STRIDE": 30, "RESIDUAL": True, "RES_STRIDE": 24}, {"rows": 21}, SMALL,
    ),
    "gated": ("qlinear", {**LINEAR, "GLU": True}, {"rows": 21}, SMALL),
    "quantize": (
        "quantize", {"X_BATCH": 600, "X_PIXEL": 1, "X_CHANNEL": 30, "HW": 30, "C": 20, "OUT_Q_STRIDE": 32, "TERMS": 2},
        {"batch": 2}, {"BLOCK_P": 8, "BLOCK_C": 16},
    ),
    "group norm": ("groupnorm", NORM, {"batch": 2}, {"BLOCK_P": 8, "BLOCK_C": 16, "BLOCK_G": 2, "STEPS": 1}),
    "group norm of two": (
        "groupnorm", {**NORM, "C": 8, "C2": 4, "X2_STRIDE": 9}, {"batch": 2},
        {"BLOCK_P": 8, "BLOCK_C": 16, "BLOCK_G": 3, "STEPS": 1},
    ),
    "group norm, given moments": (
        "groupnorm", {**NORM, "C": 8, "C2": 4, "X2_STRIDE": 4, "T": 2, "T2": 4}, {"batch": 2},
        {"BLOCK_P": 4, "BLOCK_C": 8, "BLOCK_G": 3, "STEPS": 2},
    ),
    "moments": (
        "groupnorm", {**NORM, "T": 2, "MOMENTS": True, "OUT": False, "OUT_Q": False}, {"batch": 2},
        {"BLOCK_P": 4, "BLOCK_C": 8, "BLOCK_G": 1, "STEPS": 1},
    ),
    "layer norm": (
        "layernorm", {"C": 24, "X_STRIDE": 30, "OUT_Q_STRIDE": 32}, {"rows": 5}, {"BLOCK_R": 2, "BLOCK_C": 32},
    ),
    "attention": ("attention", HEADS, {"batch": 2}, {"BLOCK_Q": 16, "BLOCK_KV": 32}),
    "attention with codes": (
        "attention", {**HEADS, "P_CODES": True, "OUT": False, "OUT_Q": True, "OUT_Q_STRIDE": 48}, {"batch": 2},
        {"BLOCK_Q": 16, "BLOCK_KV": 32},
    ),
    "float attention": ("attention_float", HEADS, {"batch": 2}, {"BLOCK_Q": 16, "BLOCK_KV": 32}),
}  # fmt: skip


def launch_of(case):
    """The launch of a case with exactly the operands that it needs, one byte type after the other."""
    name, constants, scalars, sizes = CASES[case]
    bare = Launch(name, case, {}, constants, scalars, Tile(sizes, 4, 1))
    return with_operands(bare, reach(bare))


def with_operands(launch, found):
    operands = {role: Operand("arena", 0, r.types[0], (r.elements,), (1,)) for role, r in found.items()}
    return dataclasses.replace(launch, operands=operands)


def check_inside(launch, found):
    """Every byte touched is within reach; returns the roles whose reach is used to its end."""
    tight = set()
    for role, (low, high) in touched(launch).items():
        end = found[role].elements * launch.operands[role].dtype.itemsize
        assert low >= 0 and high <= end, f"{launch.kernel} {launch.constants} {role}: {low} to {high}, believed {end}"
        tight |= {role} if high == end else set()
    return tight


@pytest.mark.parametrize("case", CASES)
def test_the_reach_is_what_the_kernel_touches(case):
    launch = launch_of(case)
    found = reach(launch)
    tight = check_inside(launch, found)
    # nothing is believed that is not so, either: room to spare would be refused memory in good plans
    assert set(found) - tight <= {"x2"} if case == "group norm, given moments" else set(found) == tight


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES.values()}))
def test_whatever_numbers_are_accepted_the_kernel_stays_within_reach(name):
    """Random wrong numbers: refused, or harmless."""
    rng, accepted = random.Random(7), 0
    cases = [case for case in CASES if CASES[case][0] == name]
    for _ in range(40):
        launch = launch_of(rng.choice(cases))
        constants, scalars, sizes = dict(launch.constants), dict(launch.scalars), dict(launch.tile.sizes)
        for _ in range(rng.choice((1, 1, 2))):
            table = rng.choice((constants, constants, constants, scalars, sizes))
            key = rng.choice(sorted(table) if table is not constants else sorted(kernel(name).constants))
            table[key] = wrong(rng, table.get(key, kernel(name).constants.get(key)))
        changed = dataclasses.replace(launch, constants=constants, scalars=scalars, tile=Tile(sizes, 4, 1))
        try:
            found = reach(changed)
            if max(r.elements for r in found.values()) > 1 << 20 or max(sizes.values()) > 128:
                continue  # too large to interpret
            check_inside(with_operands(changed, found), found)
            accepted += 1
        except (ArtifactError, TooLong):
            continue
    assert accepted >= 4, accepted


def test_the_sm90_kernels_reach_as_far_as_the_portable_ones():
    launch = launch_of("1x1 without a border")
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "SPLIT_K": 1}
    portable = dataclasses.replace(launch, tile=Tile(sizes, 4, 3))
    other = dataclasses.replace(portable, kernel="qconv2d_sm90", tile=Tile({**sizes, "STAGES": 3}, 4, 3))
    assert tiles.is_asynchronous(other.tile) and reach(other) == reach(portable)
    for constants in ({"GLU": True}, {"SEGMENTS": 2, "C2": 4, "X2_STRIDE": 16, "KC2": 32}):
        with pytest.raises(ArtifactError, match="kernel without them"):
            reach(dataclasses.replace(other, constants={**other.constants, **constants}))


@pytest.mark.parametrize(
    "changes",
    [{"pixels": 61}, {"KC": 33}, {"KC": 0}, {"X_STRIDE": 24}, {"X_STRIDE": 16}, {"BITS": 2}, {"OH": 0}, {"O": -1},
     {"OUT_STRIDE": 9}, {"UPSAMPLE": 3}, {"PAD_T": -1}, {"ROW": 1}, {"DOTS": 4}, {"BLOCK_M": 24}, {"SPLIT_K": 0}],
    ids=str,
)  # fmt: skip
def test_numbers_that_the_kernel_is_not_made_for_are_refused(changes):
    launch = launch_of("convolution")
    tables = {"constants": dict(launch.constants), "scalars": dict(launch.scalars), "sizes": dict(launch.tile.sizes)}
    for key, value in changes.items():
        next((t for t in tables.values() if key in t), tables["constants"])[key] = value
    changed = dataclasses.replace(
        launch, constants=tables["constants"], scalars=tables["scalars"], tile=Tile(tables["sizes"], 4, 1)
    )
    with pytest.raises(ArtifactError):
        reach(changed)


def test_a_border_is_noticed_as_the_kernel_notices_it():
    """Without padding a tap can still leave the image at the far side."""
    launch = launch_of("1x1 without a border")
    assert "pad" not in reach(launch)
    past = dataclasses.replace(launch, constants={**launch.constants, "OH": 6}, scalars={"pixels": 72})
    assert reach(past)["pad"].elements == 32 and torch.int8 in reach(past)["pad"].types
