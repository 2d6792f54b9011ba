"""Unpacking int4 weights in registers costs at most 12 % more instructions than int8 weights, read in the machine code."""

import pytest

from edadm_compile.driver import synthetic
from edadm_compile.kernels import aot, census
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.tiles import tile_key

SIZES = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "SPLIT_K": 1}


def compiled(bits, tile):
    """A convolution of 384 channels for sm_90 with the given tile."""
    probe = synthetic.convolution(synthetic.Settings(""), 384, 384, (32, 32), 3, bits=bits).launch
    key = tile_key(probe.kernel, kernel(probe.kernel).values(probe))
    plan = synthetic.convolution(synthetic.Settings("sm_90", tiles={key: tile}), 384, 384, (32, 32), 3, bits=bits).plan
    assert plan.launches[0].tile == tile
    (cubin,) = aot.compile_plans([plan], jobs=1).values()
    return census.census(cubin.data, cubin.shared)


@pytest.mark.parametrize(("sizes", "warps"), [(SIZES, 8), ({**SIZES, "BLOCK_M": 64}, 4)], ids=["128x128", "64x128"])
def test_unpacking_is_cheap(sizes, warps):
    eight, four = (compiled(bits, Tile(sizes, warps, 3)) for bits in (8, 4))
    assert four.instructions <= 1.12 * eight.instructions
    for found in (eight, four):
        assert not census.check(found, "sm_90", integer=True) and found.async_copies
    assert four.shared < eight.shared  # half the weights on their way
