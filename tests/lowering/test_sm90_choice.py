"""A measured tile of the asynchronous kernels selects them, where they can do what the launch asks."""

import pytest
import torch

from edadm_compile.kernels import aot, qconv2d_sm90, tiles
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import kernel
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from tests.lowering.plans import lowered
from tests.lowering.test_fusion import Body, Residual


@pytest.fixture(scope="module")
def program():
    return lowered(Body(Residual()), (3, 64, 64), uniform=True)


def key(launch):
    return tiles.tile_key(launch.kernel, kernel(launch.kernel).values(launch))


def plan(program, given, arch="sm_90"):
    return make_plan(program, Target(arch, 1, torch.float16, tiles=given))


def test_a_measured_tile_selects_the_kernel(program):
    launch = next(x for x in plan(program, {}).launches if x.constants.get("RESIDUAL"))
    tile = qconv2d_sm90.candidates(kernel(launch.kernel).values(launch))[0]
    chosen = plan(program, {key(launch): tile})
    found = next(x for x in chosen.launches if x.layer == launch.layer)
    assert found.kernel == "qconv2d_sm90" and found.tile == tile and key(found) == key(launch)
    assert all(c.spills == 0 for c in aot.compile_plans([chosen]).values())


def test_what_they_cannot_do_keeps_the_portable_kernel(program):
    """The output is written channels-first from accumulators that would not fit; on sm_89 they do not exist."""
    portable = plan(program, {})
    head, wide = (
        portable.launches[-1],
        Tile({"BLOCK_M": 64, "BLOCK_N": 256, "BLOCK_K": 32, "SPLIT_K": 1, "STAGES": 4}, 4, 4),
    )
    assert head.constants["OUT_NCHW"]
    assert plan(program, {key(head): wide}).launches[-1] == head
    inner = next(x for x in portable.launches if x.constants.get("RESIDUAL"))
    assert all(not x.kernel.endswith("_sm90") for x in plan(program, {key(inner): wide}, "sm_89").launches)


def test_without_measurements_nothing_selects_them(program):
    assert not any(x.kernel.endswith("_sm90") for x in plan(program, {}).launches)
