"""Choice of tiles at compile time: measured tables where there are any, else a cost model.

The model is coarse on purpose: it ranks a few tiles by whole waves of programs, the length of the K loop and the cost of
splitting it. `edadm-compile tune` replaces its answers with measured ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.registry import cdiv, kernel

#: Constants that decide how fast a tile is; with the batch they are the key of a measured table.
_KEY = ("H", "W", "C", "KH", "KW", "STRIDE_H", "UPSAMPLE", "O", "BITS", "SEGMENTS", "C2", "GLU", "pixels", "rows")


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of an architecture (data sheets).

    Attributes:
        sms: streaming multiprocessors of the largest common part.
        tops: dense int8 operations per second, in 10^12.
        shared: shared memory a multiprocessor offers to programs, in KiB.
    """

    sms: int
    tops: float
    shared: int


#: sm_100 runs int8 through mma.sync, at about half of its sheet.
MACHINES = {
    "sm_80": Machine(108, 624, 164), "sm_86": Machine(82, 284, 100), "sm_89": Machine(128, 660, 100),
    "sm_90": Machine(132, 1979, 228), "sm_100": Machine(148, 1800, 228), "sm_120": Machine(170, 838, 100),
}  # fmt: skip
#: (BLOCK_M, BLOCK_N, warps): share of the peak that a program reaches when the multiprocessor is full.
_SHAPES = {
    (128, 128, 4): 0.75, (128, 128, 8): 0.72, (128, 64, 4): 0.65, (64, 128, 4): 0.65, (64, 64, 4): 0.5, (32, 64, 4): 0.35,
    (64, 32, 4): 0.35, (32, 32, 4): 0.22,
}  # fmt: skip
_SPLITS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
#: Microseconds: a program's start and end, one step of the K loop that waits for memory, handing over partial sums.
_START, _STEP, _SPLIT = 1.5, 0.10, 1.2
#: Partial sums per second through the second-level cache, in 10^6 per microsecond.
_PARTIALS = 0.5


def tile_key(name: str, values: Mapping[str, Any]) -> str:
    """The shape of a launch as text: what a measured table is indexed by."""
    return " ".join([family(name), *(f"{k}={int(values[k])}" for k in _KEY if values.get(k))])


def family(name: str) -> str:
    """The portable kernel that computes the same: "qconv2d" for "qconv2d_sm90"."""
    return name.removesuffix("_sm90")


def stored_rows(outputs: int) -> int:
    """Rows of weights in memory, zeros behind the last output: one layout for every tile of up to 128 rows."""
    block = 128 if outputs > 64 else 64
    return cdiv(outputs, block) * block


def is_asynchronous(tile: Tile) -> bool:
    """Whether a tile is one of the asynchronous sm_90 kernels (``qconv2d_sm90``), which alone have STAGES."""
    return "STAGES" in tile.sizes


def _usable(name: str, values: Mapping[str, Any], tile: Tile, arch: str) -> bool:
    """Whether a measured tile fits this launch: a table knows shapes, not everything a launch fuses."""
    if not is_asynchronous(tile):
        return True
    from edadm_compile.kernels import qconv2d_sm90  # which chooses among the tiles of this module

    return arch == "sm_90" and not qconv2d_sm90.supports({**values, **tile.sizes}, tile.num_warps)


def choose(name: str, values: Mapping[str, Any], arch: str, given: Mapping[str, Tile] | None = None) -> Tile:
    """The tile for a launch.

    Args:
        name: kernel.
        values: its constants and scalars.
        arch: "sm_90" and so on; "" (a plan for the CPU) is treated like sm_90.
        given: tiles that come before everything else, by `tile_key`.
    """
    full = {**kernel(name).constants, **values}
    key = tile_key(name, full)
    measured = (given or {}).get(key) or tuned(arch).get(key)
    if measured is not None and _usable(name, full, measured, arch):
        return measured
    if name in ("qconv2d", "qlinear"):
        return min(candidates(full, arch), key=lambda tile: (cost(full, tile, arch), tile.sizes["SPLIT_K"]))
    module = __import__(f"edadm_compile.kernels.{name}", fromlist=["choose"])
    result: Tile = module.choose(full)
    return result


def _block_ks(values: Mapping[str, Any]) -> list[int]:
    """BLOCK_K that fits the channels with little padding; int4 needs two products of 32 codes each.

    One answer per layer, whatever the batch: the device layout of weights depends on it, and plans share weights.
    """
    least = 64 if 4 in (values["BITS"], values["BITS2"]) else 32
    channels = [values["C"], *([values["C2"]] if values["SEGMENTS"] == 2 else [])]
    fits = [b for b in (128, 64, 32) if b >= least and all(cdiv(c, b) * b <= 1.15 * c for c in channels)]
    return fits[:1] or [least]


def candidates(values: Mapping[str, Any], arch: str) -> list[Tile]:
    """Tiles that fit a matrix launch on an architecture."""
    found = []
    count = values.get("pixels") or values["rows"]
    for block_k in _block_ks(values):
        steps = _steps(values, block_k)
        for block_m, block_n, warps in _SHAPES:
            if (block_m > 64 and block_m >= 2 * values["O"]) or (block_n > 64 and block_n >= 2 * count):
                continue
            if not _compiles_well(values, block_m, block_n, block_k, warps, arch):
                continue
            stages = _stages(values, block_m, block_n, block_k, arch)
            for split in _SPLITS:
                if split > 1 and (values["SEGMENTS"] == 2 or values["GLU"] or split * 4 > steps):
                    continue
                if split > 1 and block_m == 128 and block_n * block_k >= 64 * 128 and warps == 4:
                    continue  # spills on sm_89 and sm_90
                sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT_K": split}
                found.append(Tile(sizes, warps, stages))
    return found


def deeper(values: Mapping[str, Any], tile: Tile, arch: str) -> Tile | None:
    """The same tile with K steps of 256, for `tune`: half as many waits where the product itself is short.

    Only where the channels fill them, with 8-bit weights (whose layout does not depend on the depth).
    """
    sizes = {**tile.sizes, "BLOCK_K": 256}
    one = values["BITS"] == 8 and values["SEGMENTS"] == 1 and not values["GLU"] and not is_asynchronous(tile)
    if not one or values["C"] % 256 or sizes["SPLIT_K"] * 2 > _steps(values, 256):
        return None
    block_m, block_n = sizes["BLOCK_M"], sizes["BLOCK_N"]
    return Tile(sizes, tile.num_warps, _stages(values, block_m, block_n, 256, arch))


def _compiles_well(values: Mapping[str, Any], block_m: int, block_n: int, block_k: int, warps: int, arch: str) -> bool:
    """Whether a tile compiles without spills and byte-wise loads: found by compiling for all architectures."""
    extras = sum(bool(values[name]) for name in ("ROW", "RESIDUAL", "ACT", "STATS"))
    two = values["SEGMENTS"] == 2 or values["GLU"]
    if (block_m, block_n, warps) == (128, 128, 4):
        int4 = 4 in (values["BITS"], values["BITS2"])
        plain = not two and not extras and not (values["OUT"] and values["OUT_Q"])
        return plain and not (int4 and block_k == 128 and arch in ("sm_100", "sm_120"))
    if values["GLU"]:
        small = block_m * block_n <= 64 * 64 and (block_m, block_n) != (32, 32)
        return small or (block_k < 128 and block_m * block_n > 64 * 64 and (block_m, block_n, warps) != (128, 64, 4))
    # the smallest tile in deep steps loads its operands byte by byte on sm_80, 86 and 89
    return (block_m, block_n) != (32, 32) or (block_k < 128 and not two)


def _steps(values: Mapping[str, Any], block_k: int) -> int:
    taps = values.get("KH", 1) * values.get("KW", 1)
    blocks = cdiv(values["C"], block_k) + (cdiv(values["C2"], block_k) if values["SEGMENTS"] == 2 else 0)
    return int(taps * blocks)


def _stages(values: Mapping[str, Any], block_m: int, block_n: int, block_k: int, arch: str) -> int:
    """Load pipeline: as deep as two programs per multiprocessor allow, at most 4."""
    weights = block_m * block_k * values["BITS"] // 8 * (2 if values["GLU"] else 1)
    room = MACHINES[arch or "sm_90"].shared * 1024 // 2 - 4096
    return int(max(2, min(4, room // (weights + block_n * block_k))))


def cost(values: Mapping[str, Any], tile: Tile, arch: str) -> float:
    """Estimated microseconds."""
    machine = MACHINES[arch or "sm_90"]
    block_m, block_n, block_k = (tile.sizes[f"BLOCK_{d}"] for d in "MNK")
    split, count = tile.sizes["SPLIT_K"], values.get("pixels") or values["rows"]
    gates = 2 if values["GLU"] else 1
    tiles = cdiv(values["O"], block_m) * cdiv(count, block_n)
    share = _SHAPES[(block_m, block_n, tile.num_warps)]
    if block_m < 64 and arch in ("sm_90", ""):
        share *= 0.6  # too few rows for wgmma: the older instruction runs
    resident = max(1, min(4, 128 * 128 * 2 // (block_m * block_n * gates)))
    waves = cdiv(tiles * split, machine.sms * resident)
    together = min(resident, cdiv(tiles * split, machine.sms))
    flops = 2.0 * block_m * block_n * block_k * gates
    compute = flops * together / (machine.tops / machine.sms * 1e6 * share)
    steps = cdiv(_steps(values, block_k), split)
    time = waves * (_START + steps * max(_STEP, compute))
    if split > 1:
        time += _SPLIT + 2e-6 * split * tiles * block_m * block_n / _PARTIALS
    return time


@cache
def tuned(arch: str) -> dict[str, Tile]:
    """Measured tiles that ship with the package for an architecture; empty where nothing was measured."""
    file = resources.files("edadm_compile.kernels") / "tuned" / f"{arch}.json"
    if not arch or not file.is_file():
        return {}
    return parse_table(json.loads(file.read_text()))


def parse_table(table: Mapping[str, Any]) -> dict[str, Tile]:
    """A measured table from JSON: {"tiles": {key: {"sizes": ..., "num_warps": ..., "num_stages": ...}}}."""
    return {key: Tile(dict(t["sizes"]), int(t["num_warps"]), int(t["num_stages"])) for key, t in table["tiles"].items()}
