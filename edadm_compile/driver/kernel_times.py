"""Time of every launch of a plan alone, against what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edadm_compile.driver import ceilings
from edadm_compile.driver.single_launch import GpuRunner, Runner, fill, isolate, operations, traffic
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.kernels.launch import Launch, LaunchPlan
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.targets import arch_of
from edadm_compile.kernels.tiles import family
from edadm_compile.passes.base import Progress
from edadm_compile.runtime.artifact import Artifact

#: Turns of each launch.
_ROUNDS = 5


def all_launches(loaded: Artifact, batches: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Every launch of the plans for `batches` on the GPU present, and the ceilings they are compared with.

    Returns:
        ``ceilings`` and ``plans``: by batch size rows sorted by time.
    """
    assert loaded.device is not None
    runner = GpuRunner(torch.device("cuda", torch.cuda.current_device()))
    found = ceilings.measure(runner, arch_of())
    plans = {}
    for batch in batches:
        plan = loaded.device.plans.get((arch_of(), batch))
        if plan is not None:
            progress.stage(f"batch {batch}: launches", len(plan.launches))
            plans[str(batch)] = shares(launch_times(plan, loaded.lowered, runner, progress), found)
    return {"ceilings": found, "plans": plans}


def launch_times(plan: LaunchPlan, program: Program, runner: Runner, progress: Progress) -> list[dict[str, Any]]:
    """Microseconds of each launch alone, repeated on random data: what it reads is in the caches when it fits."""
    rows = []
    runner.prepare([plan])
    shared: dict[str, torch.Tensor] = {}
    for index, launch in enumerate(plan.launches):
        alone = isolate(plan, launch)
        memory = Memory(alone, lambda name: get_constant(program.graph_module, name), runner.device, shared=shared)
        fill(memory)
        row = _row(index, launch, index < plan.conditioning)
        try:
            row["microseconds"] = runner.time({"": runner.bind(memory)}, _ROUNDS)[""].median
        except RuntimeError as error:  # a library operator that cannot be recorded
            row["failed"] = str(error).splitlines()[0][:160]
        rows.append(row)
        progress.advance(1, launch.kernel)
    return rows


def _row(index: int, launch: Launch, once: bool) -> dict[str, Any]:
    return {
        "index": index, "kernel": launch.kernel, "layer": launch.layer, "once_per_prompt": once,
        "operations": operations(launch), "bytes": traffic(launch),
        "tile": {**launch.tile.sizes, "num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages},
    }  # fmt: skip


def shares(rows: Sequence[dict[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with their share of the step and of the measured ceiling, slowest first.

    Integer matrix launches are compared with the int8 peak, all others with the copy bandwidth.
    """
    total = sum(row["microseconds"] for row in rows if "microseconds" in row and not row["once_per_prompt"])
    result = []
    for row in rows:
        if "microseconds" in row:
            seconds = row["microseconds"] / 1e6
            matrix = family(row["kernel"]) in ("qconv2d", "qlinear")
            rate = (row["operations"] if matrix else row["bytes"]) / seconds
            peak = found["int8_operations_per_second" if matrix else "copy_bytes_per_second"]
            ceiling = "int8 peak" if matrix else "copy bandwidth"
            share = None if row["once_per_prompt"] or not total else row["microseconds"] / total
            row = {**row, "share_of_step": share, "share_of_peak": rate / peak, "ceiling": ceiling}
        result.append(row)
    return sorted(result, key=lambda row: -row.get("microseconds", 0.0))
