"""Integer convolution for sm_90 alone: matrix products and copies stay in flight (Gluon).

Formula, roles, scalars and constants of `edadm_compile.kernels.qconv2d`, with one more tile size:
    STAGES: buffers of operands in shared memory, at least 2; takes the place of the tile's `num_stages`.

Triton waits for every product of bytes before it starts the next; here one step is in flight while the next one is
prepared. It takes a part of the launches (`supports`), and nothing chooses it unless it was measured to be faster.
DOTS means nothing here.
"""

from __future__ import annotations

import dataclasses

from edadm_compile.kernels import qconv2d, tiles
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import Values, cdiv
from edadm_compile.kernels.targets import SHARED_LIMIT

KERNEL = dataclasses.replace(
    qconv2d.KERNEL,
    name="qconv2d_sm90",
    sizes=(*qconv2d.TILE_SIZES, "STAGES"),
    entry="edadm_compile.kernels.gluon.qconv2d:qconv2d_sm90",
)
#: BLOCK_M, BLOCK_N, warps. 128 accumulators per thread at most: two programs of 4 warps fill a multiprocessor's
#: registers, one of 8.
_SHAPES = (
    (128, 128, 4),
    (64, 256, 4),
    (64, 128, 4),
    (64, 64, 4),
    (128, 64, 4),
    (128, 256, 8),
    (256, 128, 8),
    (128, 128, 8),
)
#: Shared memory of a multiprocessor that programs divide among them, and what the driver takes of each one's part.
_SHARED, _RESERVED = 228 << 10, 1 << 10
_MAX_STAGES = 4


def stage_bytes(values: Values) -> int:
    """Bytes of the operands of one K step."""
    weights = values["BLOCK_M"] * values["BLOCK_K"] * values["BITS"] // 8
    return int(weights + values["BLOCK_N"] * values["BLOCK_K"])


def shared_bytes(values: Values) -> int:
    """Shared memory of a program: the operands, and after them the accumulators on their way out, in the same place."""
    return max(int(values["STAGES"]) * stage_bytes(values), 4 * int(values["BLOCK_M"] * values["BLOCK_N"]))


def supports(values: Values, num_warps: int = 4) -> str:
    """Why a launch needs the portable kernel, "" where it does not.

    Args:
        values: constants, scalars and tile sizes.
        num_warps: of the tile.
    """
    v = values
    block_m, block_n, block_k = v["BLOCK_M"], v["BLOCK_N"], v["BLOCK_K"]
    whole = v["STATS"] or v["OUT_NCHW"]  # epilogues of all pixels of the tile at once
    reasons = {
        "two segments": v["SEGMENTS"] != 1,
        "a gated output": v["GLU"],
        "a sum over several programs": v["SPLIT_K"] != 1,
        "exact requantization": v["EXACT"] and v["OUT_Q"],
        f"{num_warps} warps": num_warps not in (4, 8),
        f"{block_m} rows of weights for {num_warps} warps": block_m % (16 * num_warps) != 0,
        f"{block_m} rows where the weights end": cdiv(v["O"], block_m) * block_m > tiles.stored_rows(v["O"]),
        f"{block_n} columns": block_n not in (64, 128, 256),
        f"a depth of {block_k}": block_k not in ((64, 128) if v["BITS"] == 4 else (32, 64, 128)),
        "that many accumulators": block_m * block_n > num_warps * (2048 if whole else 4096),
        f"{v['STAGES']} stages": v["STAGES"] < 2,
        f"{shared_bytes(v)} bytes of shared memory": shared_bytes(v) > SHARED_LIMIT["sm_90"],
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def candidates(values: Values) -> list[Tile]:
    """Tiles worth measuring; none for a launch that needs the portable kernel.

    The depth is the portable tiles': the layout of the weights depends on it.

    Args:
        values: constants and scalars; without tile sizes.
    """
    full = {**qconv2d.KERNEL.constants, **values}
    count = full.get("pixels") or full["rows"]
    depths = sorted({tile.sizes["BLOCK_K"] for tile in tiles.candidates(full, "sm_90")})
    found = []
    for depth in depths:
        for block_m, block_n, warps in _SHAPES:
            if (block_m > 64 and block_m >= 2 * full["O"]) or (block_n > 64 and block_n >= 2 * count):
                continue
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": depth, "SPLIT_K": 1}
            room = _SHARED * warps // 8 - _RESERVED  # two programs of 4 warps, or one of 8
            stages = min(_MAX_STAGES, room // stage_bytes({**full, **sizes}))
            sizes["STAGES"] = stages
            if not supports({**full, **sizes}, warps):
                found.append(Tile(sizes, warps, stages))
    return found
