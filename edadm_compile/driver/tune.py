"""Measured tiles for a compiled file on the GPU present."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.driver import device_code, fp16_times
from edadm_compile.driver.outputs import check_writable
from edadm_compile.driver.single_launch import GpuRunner, Runner, agrees, fill, operations
from edadm_compile.driver.tune_search import Found, Shape, key_of, search, shapes_of
from edadm_compile.errors import InputError, TargetError, did_you_mean
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.kernels import aot, execute
from edadm_compile.kernels.aot_cache import default_cache
from edadm_compile.kernels.launch import LaunchPlan, Tile
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.request import triton_version
from edadm_compile.kernels.targets import TARGETS, arch_of
from edadm_compile.kernels.tiles import parse_table
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.runtime.artifact import Artifact, read, write_atomically

#: Launches with fewer operations are also compared with their reference kernel on the CPU.
_CHECKED = 2e9
_ROUNDS = 3
FLOAT_NOTE = (
    "layers for which the library is faster in fp16 than the best integer tile together with the quantizer that feeds "
    "it; reported only: this file still runs them in integers (DeviceOptions.float_layers is the switch)"
)


class GpuMeasure:
    """`tune_search.Measure` on a device: checks a candidate, then times it.

    Args:
        runner: of the device.
        program: for the constants.
    """

    def __init__(self, runner: Runner, program: Program) -> None:
        self.runner = runner
        self._tensors: Callable[[str], Tensor] = lambda name: get_constant(program.graph_module, name)
        self._shared: dict[str, Tensor] = {}
        self._results: dict[str, dict[str, Tensor]] = {}

    def __call__(self, plan: LaunchPlan) -> float:
        """Microseconds of the one launch of a plan.

        Raises:
            TargetError: it computes something else than the first candidate of its shape, or than the reference.
        """
        memory = Memory(plan, self._tensors, self.runner.device, shared=self._shared)
        memory.poison()
        fill(memory)
        call = self.runner.bind(memory)
        call()
        self._check(plan, memory)
        return self.runner.time({"": call}, _ROUNDS)[""].median

    def _check(self, plan: LaunchPlan, memory: Memory) -> None:
        launch = plan.launches[0]
        roles: list[str] = [role for role in ("out", "out_q") if role in launch.writes]
        found = {role: memory.view(launch.operands[role]).cpu() for role in roles}
        if bool(memory.counters.any()):
            raise TargetError(f"{launch.layer}: {_tile(plan)} leaves a counter behind")
        key = f"{plan.batch} {key_of(launch)}"
        if key not in self._results:
            if operations(launch) <= _CHECKED:
                self._against_reference(plan, found)
            self._results = {key: found}  # shapes come one after the other
            return
        for role, first in self._results[key].items():
            floats = first.dtype.is_floating_point
            if not (agrees(found[role], first) if floats else torch.equal(found[role], first)):
                raise TargetError(f"{launch.layer}: {_tile(plan)} computes another {role} than {key}")

    def _against_reference(self, plan: LaunchPlan, found: Mapping[str, Tensor]) -> None:
        """The built-in choice against the kernel's reference on the CPU."""
        memory, launch = Memory(plan, self._tensors, "cpu"), plan.launches[0]
        source = Memory(plan, self._tensors, self.runner.device, shared=self._shared)
        fill(source)  # the same values: generators of one device
        memory.arena.copy_(source.arena)
        for name, value in source.inputs.items():
            memory.inputs[name].copy_(value)
        execute.reference(launch, {role: memory.view(o) for role, o in launch.operands.items()})
        for role, value in found.items():
            expected = memory.view(launch.operands[role])
            if not agrees(value, expected):
                raise TargetError(f"{launch.layer}: {_tile(plan)} computes another {role} than the reference kernel")


def _tile(plan: LaunchPlan) -> str:
    tile = plan.launches[0].tile
    return f"tile {dict(tile.sizes)} with {tile.num_warps} warps and {tile.num_stages} stages"


def run(
    artifact: Path, output: Path, batches: tuple[int, ...] | None, budget: float | None, table: Path | None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Tune a file on the GPU present and write it with the tiles found.

    Returns:
        the table and what was written; with ``interrupted`` only the table file, if one was asked for.

    Raises:
        TargetError: no GPU here, or one that no code is made for.
        EdadmError: a file that cannot be read or written.
    """
    for written in (output, *(() if table is None else (table,))):
        check_writable(written)
    loaded = read(artifact)
    device_code.check_has_form(loaded)
    if not torch.cuda.is_available():
        raise TargetError(
            "tune measures kernels on a GPU and torch finds no CUDA GPU here; run it on the GPU's machine"
        )
    arch = arch_of()
    if arch not in TARGETS:
        raise TargetError(f"this GPU is {arch}; code is made for {', '.join(TARGETS)}")
    runner = GpuRunner(torch.device("cuda", torch.cuda.current_device()))
    options = options_for(loaded, arch, batches)
    result, found = tune(loaded, arch, options, runner, budget, progress or Silent())
    result["gpu"] = torch.cuda.get_device_name()
    return finish(result, found, artifact, output, table, options, progress or Silent())


def prepare(
    artifact: Path, arch: str, batches: tuple[int, ...] | None, progress: Progress | None = None
) -> dict[str, Any]:
    """Compile what `run` will try on a GPU of architecture `arch`, into the cache of kernels; needs no GPU.

    A `run` that finds that cache (same version of Triton) measures at once.

    Returns:
        arch, batches, numbers of shapes, candidates and kernels, candidates that do not compile, and the cache.

    Raises:
        InputError: an unknown architecture.
        TargetError: Triton is missing.
        EdadmError: a file that cannot be read.
    """
    if arch not in TARGETS:
        raise InputError(f"--prepare: got {arch!r}, allowed {', '.join(TARGETS)}{did_you_mean(arch, TARGETS)}")
    progress = progress or Silent()
    loaded = read(artifact)
    device_code.check_has_form(loaded)
    targets, shapes = _to_try(loaded.lowered, arch, options_for(loaded, arch, batches), progress)
    plans = [plan for shape in shapes for plan in shape.candidates]
    kernels = len(aot.distinct(plans))
    progress.stage("kernels", kernels)
    refused = GpuRunner(torch.device("cuda")).prepare(plans, progress.advance)
    return {
        "arch": arch, "batches": [target.batch for target in targets], "triton": triton_version(), "shapes": len(shapes), "candidates": len(plans),
        "kernels": kernels, "refused": sorted(set(refused.values())), "cache": str(default_cache()),
    }  # fmt: skip


def _to_try(
    program: Program, arch: str, options: device_code.DeviceOptions, progress: Progress
) -> tuple[list[Target], list[Shape]]:
    """What plans are made for, and every matrix shape in them with its candidates."""
    store = device_code.STORES[options.store]
    targets = [Target(arch, batch, store) for batch in device_code.batches_for(program, options.batches)]
    progress.stage("plans", None)
    return targets, shapes_of(program, targets, lambda: progress.advance(1))


def options_for(loaded: Artifact, arch: str, batches: tuple[int, ...] | None) -> device_code.DeviceOptions:
    """What the tuned file holds: the architectures and batches it had, and those asked for."""
    bundle = loaded.device
    if bundle is None:
        return device_code.DeviceOptions((arch,), batches or device_code.DEFAULT_BATCHES)
    had = {batch for _, batch in bundle.plans}
    targets = tuple(name for name in TARGETS if name == arch or name in bundle.archs)
    store = str(next(iter(bundle.plans.values())).store).removeprefix("torch.")
    return device_code.DeviceOptions(targets, tuple(sorted(had | set(batches or ()))), store)


def tune(
    loaded: Artifact, arch: str, options: device_code.DeviceOptions, runner: Runner, budget: float | None,
    progress: Progress,
) -> tuple[dict[str, Any], Found]:  # fmt: skip
    """Measure on a device; returns the table as JSON values and what the search found."""
    program, measure = loaded.lowered, GpuMeasure(runner, loaded.lowered)
    start = time.monotonic()
    targets, shapes = _to_try(program, arch, options, progress)
    names = [(shape.key, i) for shape in shapes for i in range(len(shape.candidates))]
    plans = [plan for shape in shapes for plan in shape.candidates]
    progress.stage("kernels", len(plans))
    refused = {names[i]: why for i, why in runner.prepare(plans, progress.advance).items()}
    left = None if budget is None else max(0.0, budget - (time.monotonic() - start))
    found = search(shapes, measure, progress=progress, budget=left, refused=refused)
    result = to_table(arch, shapes, found)
    result["batches"] = [target.batch for target in targets]
    result["faster_in_fp16"], result["fp16_note"] = [], FLOAT_NOTE
    if not found.stopped:
        progress.stage("fp16", len(shapes))
        plain = [make_plan(program, target) for target in targets]
        result["faster_in_fp16"] = fp16_times.faster(plain, shapes, found, measure, runner, progress)
    return result, found


def to_table(arch: str, shapes: Sequence[Shape], found: Found) -> dict[str, Any]:
    """A table that `tiles.parse_table` reads, with the times beside it."""
    chosen = found.tiles(shapes)
    times = {
        key: {"built_in": values[0], "best": values[found.best[key]], "tried": len(values)}
        for key, values in found.times.items()
    }
    counts = {shape.key: shape.count for shape in shapes}
    return {
        "arch": arch, "gpu": "", "triton": triton_version(),
        "tiles": {key: _plain(tile) for key, tile in sorted(chosen.items())},
        "microseconds": dict(sorted(times.items())),
        "step_microseconds": {
            name: sum(counts[key] * value[name] for key, value in times.items()) for name in ("built_in", "best")
        },
        "candidates": _candidates(shapes, found), "rejected": found.rejected, "untried": found.untried, "stopped": found.stopped,
    }  # fmt: skip


def _candidates(shapes: Sequence[Shape], found: Found) -> dict[str, list[dict[str, Any]]]:
    """Every tile that was timed, by key, the fastest first."""
    result = {}
    for shape in shapes:
        times = sorted(found.times.get(shape.key, {}).items(), key=lambda item: item[1])
        if times:
            result[shape.key] = [{"us": us, **_plain(shape.tile(index))} for index, us in times]
    return result


def _plain(tile: Tile) -> dict[str, Any]:
    return {**asdict(tile), "sizes": dict(tile.sizes)}


def finish(
    result: dict[str, Any], found: Found, artifact: Path, output: Path, table: Path | None,
    options: device_code.DeviceOptions, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Write the table if asked for, and the file unless the search was interrupted."""
    result["interrupted"] = found.stopped == "interrupted"
    if table is not None:
        write_atomically(table, (json.dumps(result, indent=1, sort_keys=True) + "\n").encode())
        result["table"] = str(table)
    if not result["interrupted"]:
        tuned = replace(options, tiles={result["arch"]: parse_table(result)})
        result |= device_code.retarget(artifact, output, tuned, progress)
    return result
