"""The kernel figures this project aims at: every candidate tile of a few large shapes, checked and timed.

    python -m benchmarks.gpu.targets --out FILE.json
    python -m benchmarks.gpu.targets --prepare sm_90        compile the candidates into the cache, no GPU needed

Portable and asynchronous kernels are reported apart, each at its best tile, beside the library in float16 and the int8
ceiling of the same run. Matrix launches write codes alone, as most do in a network; norms read float16 and write codes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import check
from benchmarks.gpu.run import FakeClock, build
from benchmarks.gpu.shapes import Conv, Linear, Norm
from edadm_compile.driver import ceilings
from edadm_compile.driver.fp16_times import library_call
from edadm_compile.driver.machine import Cpu, Gpu, describe_machine
from edadm_compile.driver.single_launch import GpuRunner, ReferenceRunner, Runner, fill, traffic
from edadm_compile.driver.synthetic import Settings, Synthetic
from edadm_compile.driver.tune_search import key_of, shortlist
from edadm_compile.kernels import aot
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.targets import arch_of
from edadm_compile.kernels.tiles import is_asynchronous

_ROUNDS = 5
PORTABLE, ASYNCHRONOUS = "portable", "sm_90 path"
#: Group, batch, shape.
SHAPES: list[tuple[str, int, Conv | Linear | Norm]] = [
    ("gemm", 1, Linear(4096, 4096, 4096)),
    ("gemm", 1, Linear(8192, 4096, 4096)),
    ("gemm", 1, Linear(8192, 8192, 8192)),
    ("conv", 8, Conv(320, 320, 64, 64)),
    ("conv", 8, Conv(640, 320, 64, 64)),
    ("conv", 8, Conv(640, 640, 32, 32)),
    ("conv", 8, Conv(1280, 640, 32, 32)),
    ("conv", 8, Conv(1280, 1280, 32, 32)),
    ("norm", 8, Norm(320, 4096, 32)),
    ("norm", 64, Norm(320, 4096, 32)),
    ("norm", 64, Norm(640, 1024, 32)),
]
TINY: list[tuple[str, int, Conv | Linear | Norm]] = [
    ("gemm", 1, Linear(64, 64, 64)), ("norm", 1, Norm(64, 64, 32)), ("norm", 1, Norm(64, 8192, 32)),
]  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """One way to run a shape.

    Attributes:
        row: index of the shape.
        bits: of the weights; 0 for norms.
        tile: its tile.
        made, small: the launch, and the same on small codes for the exact check.
    """

    row: int
    bits: int
    tile: Tile
    made: Synthetic
    small: Synthetic

    @property
    def path(self) -> str:
        """Which kernel."""
        return ASYNCHRONOUS if is_asynchronous(self.tile) else PORTABLE


def candidates(shapes: list[tuple[str, int, Conv | Linear | Norm]], arch: str) -> list[Candidate]:
    """Every tile worth trying for every shape, for 8-bit and 4-bit weights."""
    found = []
    for row, (kind, batch, shape) in enumerate(shapes):
        settings = Settings(arch, batch, outputs="out_q")
        for bits in (0,) if kind == "norm" else (8, 4):
            own = build(shape, settings, bits or 8)
            tiles = [own.launch.tile] if kind == "norm" else shortlist(own.launch, arch)
            for tile in tiles:
                with_tile = replace(settings, tiles={key_of(own.launch): tile} if bits else {})
                small = build(shape, check.small_settings(with_tile), bits or 8)
                found.append(Candidate(row, bits, tile, build(shape, with_tile, bits or 8), small))
    return found


def measure(candidate: Candidate, kind: str, runner: Runner) -> dict[str, Any]:
    """Check a candidate, then time it."""
    row: dict[str, Any] = {"path": candidate.path, "bits": candidate.bits, "tile": asdict(candidate.tile)}
    row["tile"]["sizes"] = dict(candidate.tile.sizes)
    try:
        if kind == "norm":
            wrong = check.floating(candidate.made, runner)
        else:
            wrong = check.matrix(candidate.made, candidate.small, runner)
        if wrong:
            return {**row, "failed": wrong}
        memory = Memory(candidate.made.plan, candidate.made.tensors.__getitem__, runner.device)
        fill(memory)
        check.settle(memory, candidate.made.launch)
        return {**row, "us": runner.time({"": runner.bind(memory)}, _ROUNDS)[""].median}
    except Exception as error:  # one candidate must not cost the others their time on a borrowed machine
        return {**row, "failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def best(rows: list[dict[str, Any]], path: str, bits: int) -> dict[str, Any] | None:
    """The fastest right candidate of a kernel."""
    timed = [row for row in rows if row["path"] == path and row["bits"] == bits and "us" in row]
    return min(timed, key=lambda row: row["us"]) if timed else None


def summary(kind: str, batch: int, shape: Any, rows: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """Rates and ratios of the best candidates of a shape."""
    result: dict[str, Any] = {"group": kind, "batch": batch, **asdict(shape)}
    for path in (PORTABLE, ASYNCHRONOUS):
        for bits in sorted({row["bits"] for row in rows}, reverse=True):
            fastest = best(rows, path, bits)
            if fastest is None:
                continue
            entry = {"us": fastest["us"], "tile": fastest["tile"]}
            if kind == "norm":
                entry["bytes_per_second"] = found["bytes"] / fastest["us"] * 1e6
                entry["share_of_copy"] = entry["bytes_per_second"] / found["copy_bytes_per_second"]
            else:
                rate = batch * shape.operations / fastest["us"] * 1e6
                entry["operations_per_second"] = rate
                entry["share_of_int8_peak"] = rate / found["int8_operations_per_second"]
                entry["speedup_over_fp16"] = found["fp16_us"] / fastest["us"]
            result[f"{path} w{bits}" if bits else path] = entry
    result |= {name: found[name] for name in ("fp16_us", "bytes") if name in found}
    result["failed"] = [row for row in rows if "failed" in row]
    return result


def add_peak(found: dict[str, Any], runner: Runner) -> None:
    """Put the products of resident operands among the candidates for the int8 ceiling."""
    from benchmarks.gpu import peak

    for name, (call, operations) in peak.calls(runner.device).items():
        rate = operations / runner.time({"": call}, _ROUNDS)[""].median * 1e6
        found["int8_candidates"][name] = rate
        if rate > found["int8_operations_per_second"]:
            found["int8_operations_per_second"], found["int8_reached_by"] = rate, name


def main(argv: list[str] | None = None) -> None:
    """Measure and write one JSON file, after each shape anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, reference kernels on the CPU, a fake clock"
    )
    parser.add_argument("--prepare", metavar="ARCH", help="only compile the candidates")
    parser.add_argument("--groups", default="gemm,conv,norm")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    shapes = TINY if args.dry_run else [s for s in SHAPES if s[0] in args.groups.split(",")]
    if args.prepare:
        made = [c.made.plan for c in candidates(shapes, args.prepare)]
        print(len(aot.compile_plans(made, progress=lambda n, what: print(what, flush=True))), "kernels")
        return
    if args.out is None:
        parser.error("--out is needed")
    runner: Runner
    if args.dry_run:
        runner, arch, machine = ReferenceRunner(FakeClock()), "", describe_machine(Cpu())
        found = ceilings.measure(runner, "", side=64, copy=1 << 10)
    else:
        runner, arch, machine = GpuRunner(torch.device("cuda", 0)), arch_of(0), describe_machine(Gpu())
        torch.backends.cudnn.benchmark = True
        found = ceilings.measure(runner, arch)
        if arch == "sm_90":
            add_peak(found, runner)
    run(shapes, arch, runner, {"machine": machine, "dry_run": args.dry_run, "ceilings": found}, args.out)


def run(
    shapes: list[tuple[str, int, Conv | Linear | Norm]], arch: str, runner: Runner, result: dict[str, Any], out: Path
) -> None:
    """Every shape in turn; `result` already holds the ceilings."""
    out.parent.mkdir(parents=True, exist_ok=True)
    every = candidates(shapes, arch)
    refused = runner.prepare([c.made.plan for c in every])
    result |= {"not_compiled": sorted(set(refused.values())), "shapes": [], "candidates": []}
    for index, (kind, batch, shape) in enumerate(shapes):
        mine = [c for i, c in enumerate(every) if c.row == index and i not in refused]
        rows = [measure(c, kind, runner) for c in mine]
        found: dict[str, Any] = dict(result["ceilings"])
        if kind == "norm":
            found["bytes"] = traffic(mine[0].made.launch)
        else:
            library: Callable[[], object] = library_call(mine[0].made.launch, batch, runner.device)
            found["fp16_us"] = runner.time({"": library}, _ROUNDS)[""].median
        result["shapes"].append(summary(kind, batch, shape, rows, found))
        result["candidates"].append(rows)
        print(json.dumps(result["shapes"][-1]), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
