"""Times of a compiled file beside the float model it was made from, in one process and in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.driver import bench_inputs, shapes
from edadm_compile.driver.bench_inputs import Truth, plan_note
from edadm_compile.driver.contenders import (
    Contender,
    Predict,
    baseline_contenders,
    best_algorithms,
    our_contenders,
    timed,
)
from edadm_compile.driver.machine import Device, describe_machine, pick_device
from edadm_compile.driver.options import load_options
from edadm_compile.driver.options import parse_batches as parse_batches
from edadm_compile.driver.verify import same_inputs
from edadm_compile.evaluate.metrics import finite, sqnr
from edadm_compile.evaluate.timing import Rules, interleave
from edadm_compile.frontend import Source, load_source
from edadm_compile.kernels.targets import arch_of
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.runtime.artifact import Artifact, read
from edadm_compile.runtime.engines.onnxruntime import missing_packages
from edadm_compile.runtime.engines.reference import ReferenceEngine

_NO_GPU = "no GPU kernel was measured: these are the CPU engines; the reference engine defines what is right and is not made for speed"
_NO_ONNXRUNTIME = "; the onnxruntime engine is missing because {} is not installed (pip install 'edadm-compile[onnx]')"
_METHOD = (
    "contenders take turns in one process; x and t rotate, conditions stay; inputs lie where the contender wants them; "
    "microseconds per call with the host's work, median and p10 to p90 over rounds; ratios from turns of the same round"
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        batches: batch sizes; None for those of the file's plans, on the CPU for 1.
        repeats: rounds; None for 30 on a GPU, 10 on the CPU.
        kernels: also every launch alone.
        baselines: names in `contenders.BASELINES`; None for all.
        warm_time: seconds of warm-up per contender at most.
        seed: of the inputs.
    """

    batches: tuple[int, ...] | None = None
    repeats: int | None = None
    kernels: bool = False
    baselines: Sequence[str] | None = None
    warm_time: float = 10.0
    seed: int = 0


def run(
    artifact: Path, baseline: Path | None, options: Options, device: str | None, progress: Progress | None = None,
    **source_options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Measure a file; see `measure` for the result.

    Args:
        baseline: the float model that was compiled.
        device: "cpu", "cuda", or None for the GPU where there is one.
        source_options: how to load the baseline.

    Raises:
        EdadmError: files that cannot be used, a GPU without code in the file, or results that are wrong.
    """
    whole = read(artifact)
    loaded, source_options = shapes.choose(whole, source_options)
    source = None
    if baseline is not None:
        source = load_source(baseline, load_options(source_options, loaded.lowered.sampler))
        same_inputs(source, loaded, "--baseline")
    result = measure(artifact, loaded, source, options, pick_device(device), progress)
    return {**shapes.told(whole, loaded), **result}


def measure(
    path: Path, loaded: Artifact, source: Source | None, options: Options, device: Device,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Check and time every contender at every batch size.

    Returns:
        machine, method, and for each batch size one row per contender: microseconds, ratio to the first (ours), images
        per second, peak and weight bytes, seconds of the first call, dB to the reference engine and the float model.

    Raises:
        EdadmError: as `run`.
    """
    contenders = our_contenders(path, device.kind, loaded.lowered)
    contenders += [] if source is None else baseline_contenders(source, device.kind, options.baselines)
    state = _Bench(loaded, source, options, device, contenders, progress or Silent())
    batches = options.batches or _default_batches(loaded, device)
    with best_algorithms():
        groups = [state.batch(batch) for batch in batches]
    result: dict[str, Any] = {
        "artifact": str(path), "file_bytes": path.stat().st_size, "device": device.kind,
        "machine": describe_machine(device), "method": _METHOD, "note": _note(device),
        "batches": groups,
    }  # fmt: skip
    if options.kernels and device.kind == "cuda":
        from edadm_compile.driver.kernel_times import all_launches

        result["kernels"] = all_launches(loaded, batches, state.progress)
    return result


def _note(device: Device) -> str:
    if device.kind == "cuda":
        return ""
    missing = missing_packages()
    return _NO_GPU + (_NO_ONNXRUNTIME.format(missing) if missing else "")


def _default_batches(loaded: Artifact, device: Device) -> tuple[int, ...]:
    if device.kind == "cuda" and loaded.device is not None:
        return loaded.device.batches(arch_of())
    return (loaded.lowered.signature.min_batch,)


@dataclass
class _Bench:
    """One measurement under way.

    Attributes:
        running: contenders that are on their device.
        held: bytes each has allocated and kept so far.
        failed: why a baseline cannot run.
    """

    loaded: Artifact
    source: Source | None
    options: Options
    device: Device
    contenders: list[Contender]
    progress: Progress
    running: dict[str, Predict] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def batch(self, batch: int) -> dict[str, Any]:
        """Check, then time, all contenders at one batch size."""
        rows = {}
        self.progress.stage(f"batch {batch}: first calls", len(self.contenders))
        truth = self.truth(batch)
        for contender in self.contenders:
            rows[contender.name] = self.first(contender, batch, truth)
            self.progress.advance(1, contender.name)
        alive = [c for c in self.contenders if not rows[c.name].get("failed")]
        rules = self.rules()
        self.progress.stage(f"batch {batch}: timing", None)
        times = interleave({c.name: self.rotating(c, batch) for c in alive}, self.device.clock, rules)
        for name, timing in times.to_json(self.contenders[0].name).items():
            seconds = timing["microseconds"]["median"] / 1e6
            rows[name] |= {**timing, "images_per_second": batch / seconds}
        return {"batch": batch, "plan": self.note(batch), "rows": list(rows.values())}

    def rules(self) -> Rules:
        """Fewer and shorter turns on the CPU, where one call can take seconds."""
        gpu = self.device.kind == "cuda"
        rounds = self.options.repeats or (30 if gpu else 10)
        return Rules(rounds=rounds, warm_time=min(self.options.warm_time, math.inf if gpu else 3.0) * 1e6)

    def note(self, batch: int) -> str:
        """Which plans serve a batch."""
        if self.device.kind == "cuda" and self.loaded.device is not None:
            return plan_note(batch, self.loaded.device.batches(arch_of()))
        return "no plan: engines of the CPU choose their run mode by batch and cores"

    def truth(self, batch: int) -> Truth:
        """The right result for a few images."""
        program = self.loaded.lowered
        pool = {} if self.source is None else self.source.conditions
        inputs = bench_inputs.draw(program, min(batch, bench_inputs.CHECKED), 3, self.options.seed + 1, pool)[1]
        reference = ReferenceEngine(program)(*inputs)
        if self.source is None:
            quality = self.loaded.manifest.get("quality") or {}
            # Single predictions are compared here, not guided ones.
            known = [v for v in quality.get("branches", [quality.get("sqnr")]) if v is not None]
            return Truth(inputs, reference, None, min(known, default=None))
        original = self.source.denoiser()(*inputs).float()
        return Truth(inputs, reference, original, sqnr(original, reference))

    def first(self, contender: Contender, batch: int, truth: Truth) -> dict[str, Any]:
        """Put a contender on its device if it is not there, call it once, check what it says."""
        row = {"contender": contender.name, "what": contender.what, "weight_bytes": contender.weight_bytes}
        if contender.name in self.failed:
            return {**row, "failed": self.failed[contender.name]}
        inputs = contender.place(bench_inputs.repeated(truth.inputs, batch), self.device.kind)
        before = self.held.get(contender.name, 0)
        fresh = contender.name not in self.running
        try:
            (result, seconds), peak, held = self.device.watched(
                lambda: timed(lambda: self.predictor(contender)(*inputs), self.device.wait)
            )
        except Exception as error:
            if contender.ours:
                raise
            self.failed[contender.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            return {**row, "failed": self.failed[contender.name]}
        self.held[contender.name] = before + held
        found = bench_inputs.compare(result, truth)
        if contender.ours:
            bench_inputs.check(contender.name, batch, found, truth, contender.slack)
        elif not bool(torch.isfinite(result).all()):
            return {**row, "failed": "its prediction is not finite"}
        return {
            **row, "first_call_seconds": seconds, "first_call_is": "load to first output" if fresh else "first at this batch",
            "peak_bytes": before + peak if self.device.kind == "cuda" else None,
            "sqnr_to_reference_db": _db(found.reference), "sqnr_to_float_db": _db(found.original),
        }  # fmt: skip

    def predictor(self, contender: Contender) -> Predict:
        """The contender on its device."""
        if contender.name not in self.running:
            self.running[contender.name] = contender.build()
        return self.running[contender.name]

    def rotating(self, contender: Contender, batch: int) -> Callable[[int], object]:
        """Calls on a ring of inputs."""
        pool = {} if self.source is None else self.source.conditions
        drawn = bench_inputs.draw(self.loaded.lowered, batch, bench_inputs.RING, self.options.seed, pool)
        ring: list[list[Tensor]] = [contender.place(inputs, self.device.kind) for inputs in drawn]
        ring = [[*inputs[:2], *ring[0][2:]] for inputs in ring]  # the same condition tensors in every call
        predict = self.predictor(contender)
        return lambda number: predict(*ring[number % len(ring)])


def _db(value: float | None) -> float | None:
    value = finite(value)
    return None if value is None else round(value, 2)
