"""Every layer shape of published UNets: our kernels, checked, beside torch's libraries in float16.

    python -m benchmarks.gpu.run --models sd15,sdxl --batch 1,8 --seconds 300 --out FILE.json

A shape whose result is wrong is reported as failed, without a time. The file is written after each model and batch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import check
from benchmarks.gpu.shapes import MODELS, Attention, Conv, Linear, Norm, Shape, table
from edadm_compile.driver import synthetic
from edadm_compile.driver.fp16_times import library_call
from edadm_compile.driver.machine import Cpu, Gpu, describe_machine
from edadm_compile.driver.single_launch import GpuRunner, ReferenceRunner, Runner, fill
from edadm_compile.driver.synthetic import Settings, Synthetic
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.targets import arch_of
from edadm_compile.lowering import statistics

_ROUNDS = 5


class FakeClock:
    """Says 1, 2, 3, ... microseconds: for dry runs."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(self, call: Callable[[int], object], first: int, count: int) -> float:
        """Make the calls, invent a time."""
        for i in range(first, first + count):
            call(i)
        self.calls += 1
        return float(self.calls)


def build(shape: Shape, settings: Settings, bits: int = 8) -> Synthetic:
    """The plan of a shape."""
    if isinstance(shape, Conv):
        size = (shape.height, shape.width)
        return synthetic.convolution(
            settings, shape.channels, shape.outputs, size, shape.kernel, shape.stride, shape.upsample, bits
        )
    if isinstance(shape, Linear):
        return synthetic.linear(settings, shape.rows, shape.channels, shape.outputs, bits)
    if isinstance(shape, Norm):
        parts = shape.pixels // 128 if shape.channels // shape.groups * shape.pixels > statistics.IN_REGISTERS else 0
        return synthetic.group_norm(settings, shape.channels, shape.pixels, shape.groups, parts)
    return synthetic.attention(settings, shape.queries, shape.keys, shape.heads, shape.size)


def fp16_call(shape: Shape, made: Synthetic, device: torch.device) -> Callable[[], object]:
    """The same in torch: cuDNN or cuBLAS; for norms two operators (norm, SiLU), for attention the fused one."""
    batch = made.plan.batch
    options: dict[str, Any] = {"dtype": torch.float16, "device": device}
    if isinstance(shape, (Conv, Linear)):
        return library_call(made.launch, batch, device)
    if isinstance(shape, Norm):
        x = torch.randn(batch, shape.channels, shape.pixels, 1, **options).contiguous(memory_format=torch.channels_last)
        weight, bias = (torch.randn(shape.channels, **options) for _ in range(2))
        return lambda: torch.nn.functional.silu(torch.nn.functional.group_norm(x, shape.groups, weight, bias))
    q, k, v = (
        torch.randn(batch, length, shape.heads, shape.size, **options).transpose(1, 2)
        for length in (shape.queries, shape.keys, shape.keys)
    )
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def variants(shape: Shape, settings: Settings) -> dict[str, Synthetic]:
    """By name: W8 and W4 for matrices, one plan for the rest."""
    if isinstance(shape, (Conv, Linear)):
        return {"w8": build(shape, settings, 8), "w4": build(shape, settings, 4)}
    return {"fp16 in": build(shape, settings)}


def measure(shape: Shape, count: int, settings: Settings, runner: Runner, made: dict[str, Synthetic]) -> dict[str, Any]:
    """Check the variants of a shape, then time those that are right in turns with the library.

    Args:
        made: `variants` of the shape, prepared by the runner.
    """
    row: dict[str, Any] = {"kind": type(shape).__name__, **asdict(shape), "count": count, "ops": shape.operations}
    calls: dict[str, Callable[[], object]] = {}
    for name, item in made.items():
        tile = item.launch.tile
        row[name] = {"tile": {**tile.sizes, "warps": tile.num_warps, "stages": tile.num_stages}}
        try:
            wrong = _wrong(shape, item, settings, runner, 4 if name == "w4" else 8)
        except Exception as error:  # one shape must not cost the others their time on a borrowed machine
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        if wrong:
            row[name]["failed"] = wrong
            continue
        memory = Memory(item.plan, item.tensors.__getitem__, runner.device)
        fill(memory)
        calls[name] = runner.bind(memory)
    if calls:
        calls["fp16"] = fp16_call(shape, next(iter(made.values())), runner.device)
        for name, timing in runner.time(calls, _ROUNDS).items():
            row.setdefault(name, {})["us"] = timing.to_json()
            row[name]["tera_ops"] = settings.batch * shape.operations / timing.median / 1e6
    return row


def _wrong(shape: Shape, made: Synthetic, settings: Settings, runner: Runner, bits: int) -> str:
    if isinstance(shape, (Norm, Attention)):
        return check.floating(made, runner)
    return check.matrix(made, build(shape, check.small_settings(settings), bits), runner)


def run_model(name: str, settings: Settings, runner: Runner, deadline: Callable[[], bool]) -> dict[str, Any]:
    """All shapes of a model, the most expensive first, until the deadline.

    Args:
        deadline: whether time is up.
    """
    shapes = sorted(table(name).items(), key=lambda item: (-item[0].operations * item[1], str(item[0])))
    chosen = [(shape, count, variants(shape, settings)) for shape, count in shapes]
    plans = [item.plan for _, _, made in chosen for item in made.values()]
    refused = runner.prepare(plans)
    rows: list[dict[str, Any]] = []
    for shape, count, made in chosen:
        if deadline():
            break
        rows.append(measure(shape, count, settings, runner, made))
        print(name, settings.batch, json.dumps(rows[-1]), flush=True)
    return {
        "model": name, "batch": settings.batch, "rows": rows, "not_reached": len(chosen) - len(rows),
        "not_compiled": sorted(refused.values()), "totals": totals(rows),
    }  # fmt: skip


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of a whole evaluation for each variant, over the shapes where all of them were timed."""
    sums: dict[str, float] = {}
    for row in rows:
        names = [n for n in ("w8", "w4", "fp16 in", "fp16") if n in row]
        if any("us" not in row[n] for n in names):
            continue
        for variant in ("w8", "w4", "fp16"):
            key = variant if variant in row else "fp16 in"
            sums[variant] = sums.get(variant, 0.0) + row["count"] * row[key]["us"]["median"]
    return sums


def main(argv: list[str] | None = None) -> None:
    """Run and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default="ddim-cifar10,sd15,ldm4-lsun,ldm4-imagenet,sdxl")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes, reference kernels on the CPU, a fake clock"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    runner: Runner
    if args.dry_run:
        runner, arch, machine = ReferenceRunner(FakeClock()), "", Cpu()
    else:
        runner, arch, machine = GpuRunner(torch.device("cuda", 0)), arch_of(0), Gpu()
        torch.backends.cudnn.benchmark = True
    names = ["tiny"] if args.dry_run else args.models.split(",")
    if unknown := set(names) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}, allowed {', '.join(MODELS)}")
    result: dict[str, Any] = {"machine": describe_machine(machine), "dry_run": args.dry_run, "models": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        for batch in [int(b) for b in args.batch.split(",")]:
            if time.monotonic() < end:
                done = run_model(name, Settings(arch, batch), runner, lambda: time.monotonic() > end)
                result["models"].append(done)
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
