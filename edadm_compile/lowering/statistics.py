"""Group norms of large maps take their statistics from the launches that wrote the maps.

A group norm with statistics of its own reads its input twice with one program per group; from about 8 000 elements per
group on, they no longer stay in registers. The epilogue of a convolution can write mean and squared deviations of each
channel over its pixel tile instead, and the norm becomes one pass over pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from edadm_compile.kernels import qconv2d_sm90, tiles
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.kernels.registry import kernel
from edadm_compile.lowering.builder import Builder

#: Elements of one group that a program keeps in registers between its two passes.
IN_REGISTERS = 8192
#: More partial results than this per image cost more to merge than the second pass.
_MOST_TILES = 128


def attach(build: Builder) -> int:
    """Rewrite the launches of `build` in place; returns how many norms changed."""
    count = 0
    for i, launch in enumerate(build.launches):
        if launch.kernel == "groupnorm" and _is_large(launch):
            count += _attach(build, i, launch)
    return count


def _is_large(launch: Launch) -> bool:
    c = launch.constants
    return int(c["HW"]) * (int(c["C"]) + int(c["C2"])) // int(c["GROUPS"]) > IN_REGISTERS


def _attach(build: Builder, index: int, launch: Launch) -> bool:
    roles = [role for role in ("x", "x2") if role in launch.operands]
    producers = [_producer(build, index, launch.operands[role]) for role in roles]
    hw, batch = int(launch.constants["HW"]), int(launch.scalars["batch"])
    if any(
        p is None or not _can_tell(build.launches[p], launch.operands[r], hw)
        for p, r in zip(producers, roles, strict=True)
    ):
        return False
    operands, constants = dict(launch.operands), dict(launch.constants)
    for role, producer in zip(roles, producers, strict=True):
        assert producer is not None
        stats = _statistics_of(build, producer, hw, batch)
        suffix = role.removeprefix("x")
        operands[f"stats{suffix}"] = stats
        constants[f"T{suffix}"] = stats.shape[1]
    tile = build.tile("groupnorm", {**constants, **launch.scalars})
    build.launches[index] = replace(launch, operands=operands, constants=constants, tile=tile)
    return True


def _producer(build: Builder, index: int, value: Operand) -> int | None:
    """The launch that writes a value, if one alone does."""
    found = [
        i
        for i, launch in enumerate(build.launches[:index])
        for role in launch.writes
        if (o := launch.operands.get(role)) is not None and (o.space, o.key) == (value.space, value.key)
    ]
    return found[0] if len(found) == 1 and value.space == "arena" else None


def _can_tell(producer: Launch, value: Operand, hw: int) -> bool:
    """Whether a launch can write statistics of exactly this value."""
    c = producer.constants
    if "BLOCK_N" not in producer.tile.sizes or not c.get("OUT") or c.get("GLU") or c.get("OUT_NCHW"):
        return False
    if tiles.is_asynchronous(producer.tile):
        values = {**kernel(producer.kernel).values(producer), "STATS": True}
        if qconv2d_sm90.supports(values, producer.tile.num_warps):
            return False
    block = producer.tile.sizes["BLOCK_N"]
    whole = value.offset == 0 and value.shape[-1] == c["O"]
    return whole and hw % block == 0 and hw // block <= _MOST_TILES


def _statistics_of(build: Builder, index: int, hw: int, batch: int) -> Operand:
    """The statistics that launch `index` writes; it is made to where it does not yet."""
    launch = build.launches[index]
    if "stats" in launch.operands:
        return launch.operands["stats"]
    channels, count = int(launch.constants["O"]), hw // launch.tile.sizes["BLOCK_N"]
    stats = build.buffer((batch, count, 2, channels), torch.float32, f"{launch.layer} statistics")
    constants: Mapping[str, int | float | bool] = {**launch.constants, "STATS": True}
    if launch.kernel.startswith("qlinear"):
        constants = {**constants, "ROWS_PER_IMAGE": hw}
    operands = {**launch.operands, "stats": stats}
    tile = launch.tile
    if (
        not tiles.is_asynchronous(tile) and tile.sizes["BLOCK_M"] * tile.sizes["BLOCK_N"] == 128 * 128
    ):  # four warps have no registers left for statistics
        tile = replace(tile, num_warps=8)
    writes = (*launch.writes, "stats")
    build.launches[index] = replace(launch, operands=operands, constants=constants, writes=writes, tile=tile)
    return stats
