"""The choice of tiles: always an answer, and the same device layout of weights for every batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.kernels import tiles
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import kernel

SHAPES = {
    "O": st.integers(1, 2600), "C": st.integers(1, 2600), "rows": st.integers(1, 70_000), "BITS": st.sampled_from((4, 8)),
    "GLU": st.booleans(), "SEGMENTS": st.sampled_from((1, 2)), "OUT_Q": st.booleans(), "RESIDUAL": st.booleans(),
}  # fmt: skip


def values(**given_values):
    return {**kernel("qlinear").constants, "C2": 64, **given_values}


@given(st.fixed_dictionaries(SHAPES), st.sampled_from((*tiles.MACHINES, "")))
@settings(max_examples=300, deadline=None)
def test_there_is_a_tile_for_every_launch(shape, arch):
    full = values(**shape)
    for tile in tiles.candidates(full, arch):
        assert tile.sizes["BLOCK_K"] >= (64 if 4 in (full["BITS"], full["BITS2"]) else 32)
        assert tile.sizes["SPLIT_K"] == 1 or (full["SEGMENTS"] == 1 and not full["GLU"])
        block, outputs = tile.sizes["BLOCK_M"], full["O"]
        assert -(-outputs // block) * block <= tiles.stored_rows(outputs)  # no tile reads behind the weights
    assert tiles.choose("qlinear", full, arch) in tiles.candidates(full, arch)


@pytest.mark.parametrize("channels", [24, 64, 128, 224, 320, 640, 960, 1280, 1920])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_depth_does_not_depend_on_the_batch(channels, bits):
    """Plans of all batches share one device copy of a weight, whose layout depends on BLOCK_K."""
    depths = {
        tiles.choose("qlinear", values(O=320, C=channels, rows=rows, BITS=bits), "sm_90").sizes["BLOCK_K"]
        for rows in (1, 16, 64, 1024, 65_536)
    }
    assert len(depths) == 1
    assert -(-channels // min(depths)) * min(depths) <= max(1.15 * channels, 64)


def test_small_products_of_long_sums_are_split():
    """16 pixels and 9 * 1280 products: one tile of pixels, so only splitting the sum fills the GPU."""
    conv = {
        **kernel("qconv2d").constants,
        "C": 1280,
        "O": 1280,
        "KH": 3,
        "KW": 3,
        "H": 4,
        "W": 4,
        "OH": 4,
        "OW": 4,
        "pixels": 16,
    }
    assert tiles.choose("qconv2d", conv, "sm_90").sizes["SPLIT_K"] > 1


def test_given_tiles_come_first():
    full = values(O=320, C=320, rows=4096)
    wanted = Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 1}, 8, 2)
    assert tiles.choose("qlinear", full, "sm_90", {tiles.tile_key("qlinear", full): wanted}) == wanted


def test_longer_steps_are_for_plain_8_bit_layers_that_fill_them():
    tile = Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "SPLIT_K": 1}, 4, 4)
    full = values(O=256, C=512, rows=256, BITS=8, SEGMENTS=1, GLU=False)
    found = tiles.deeper(full, tile, "sm_90")
    assert found.sizes == {**tile.sizes, "BLOCK_K": 256} and found.num_warps == 4
    assert found.num_stages * (64 + 32) * 256 <= tiles.MACHINES["sm_90"].shared * 1024 // 2
    for change in ({"BITS": 4}, {"SEGMENTS": 2}, {"GLU": True}, {"C": 320}):
        assert tiles.deeper({**full, **change}, tile, "sm_90") is None
    split = Tile({**tile.sizes, "SPLIT_K": 2}, 4, 4)  # two programs for the two steps would have one each
    assert tiles.deeper(full, split, "sm_90") is None
    asynchronous = Tile({**tile.sizes, "STAGES": 3}, 4, 3)
    assert tiles.deeper(full, asynchronous, "sm_90") is None
