"""One batch size: start every candidate, check it, try all of them briefly, measure the best of each kind in turns."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.onnxruntime import machine
from benchmarks.onnxruntime.baselines import EXPORTERS, QUANTIZERS, Baselines
from benchmarks.onnxruntime.model import Inputs, Subject
from benchmarks.onnxruntime.modes import MODES, TORCH, Graph, Running, batch_dimension, start, start_torch
from edadm_compile.errors import InputError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.evaluate.timing import Rules, Times, Timing, WallClock, interleave

#: What all times are compared with.
BASE = "ORT fp32"
#: Different inputs that a candidate sees in turn.
_RING = 8
#: The trial of all forms: enough turns to tell apart what differs by some percent.
_TRIAL = Rules(rounds=4, turn=1e12, most_calls=2, window=1, warm_turns=1)


@dataclass(frozen=True)
class Candidate:
    """One variant in one form and one mode.

    Attributes:
        variant: what is compared.
        form: what may be chosen freely for its benefit.
        mode: how it is called.
        run: starts it.
        graph: its file; None for torch.
    """

    variant: str
    form: str
    mode: str
    run: Callable[[], Running]
    graph: Graph | None = None

    @property
    def key(self) -> str:
        """Unique."""
        return f"{self.variant} | {self.form} | {self.mode}"


@dataclass
class Comparison:
    """All batch sizes of one run.

    Attributes:
        subject: the float model.
        baselines: its ONNX files.
        ours: name -> file.
        skip: baselines to leave out, by name.
        cores: threads of a call, or callers.
        rules: of the measurement.
        seed: of the inputs.
        say: tells what is under way.
    """

    subject: Subject
    baselines: Baselines
    ours: dict[str, Path]
    skip: set[str]
    cores: int
    rules: Rules
    seed: int = 0
    say: Callable[[str], None] = print
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.cores)

    def batch(self, batch: int) -> dict[str, Any]:
        """Rows of the best form of every variant and mode, all trials, and what could not run."""
        torch.compiler.reset()
        ring = self.subject.states(_RING, batch, self.seed)
        reference = torch.cat([self.eager(inputs) for inputs in ring])
        calls: dict[str, Callable[[int], object]] = {}
        quality: dict[str, float] = {}
        failed: dict[str, str] = {}
        candidates = {c.key: c for c in self.candidates(batch, failed)}
        for key, candidate in candidates.items():
            self.say(f"batch {batch}: starting {key}")
            try:
                calls[key], quality[key] = started(candidate.run(), ring, reference)
            except Exception as error:  # a candidate that cannot run must not end the comparison
                failed[key] = _first_line(error)
        if not any(candidates[key].variant == BASE for key in calls):
            raise InputError(f"{BASE} cannot run, and everything is compared with it: {failed}")
        self.say(f"batch {batch}: trying {len(calls)} candidates")
        trial = interleave(calls, WallClock(), _TRIAL)
        chosen = best([candidates[key] for key in calls], trial)
        calls = {c.key: calls[c.key] for c in chosen}
        gc.collect()
        self.say(f"batch {batch}: measuring {len(calls)}")
        before = machine.Usage.now()
        times = interleave(calls, WallClock(), self.rules)
        busy = machine.between(before)
        return {
            "batch": batch, **busy, "rows": rows(chosen, times, quality),
            "trials": {
                key: {"milliseconds": t.median / 1e3, "sqnr_db": finite(quality[key])}
                for key, t in trial.microseconds.items()
            },
            "failed": failed,
        }  # fmt: skip

    def eager(self, inputs: Inputs) -> Tensor:
        """What the float model says."""
        with torch.no_grad():
            return self.subject.adapter()(*inputs)

    def candidates(self, batch: int, failed: dict[str, str]) -> list[Candidate]:
        """Every variant in every form and mode; baselines are exported when they are not there yet."""
        found: list[Candidate] = []
        divisible = self.cores > 1 and batch % self.cores == 0
        for mode in MODES if divisible else MODES[:1]:
            size = batch if mode == "threads" else batch // self.cores
            for variant, form, make in self.files(size):
                self.say(f"batch {batch}: preparing {variant}, {form or 'file'}, {size} image(s)")
                try:
                    path = make()
                except Exception as error:  # the tools of others may refuse a model
                    failed[f"{variant} | {form} | {mode}"] = _first_line(error)
                    continue
                fixed = (None,) if batch_dimension(path) is None else (None, size)
                graphs = [Graph(path, nhwc, rows) for nhwc in (True, False) for rows in fixed]
                found += [self.onnx(variant, form, mode, graph) for graph in graphs]
        for variant, forms in TORCH.items():
            if variant.split()[1] not in self.skip:
                found += [
                    Candidate(variant, form, "threads", functools.partial(start_torch, self.subject, *how))
                    for form, how in forms.items()
                ]
        return found

    def files(self, size: int) -> Sequence[tuple[str, str, Callable[[], Path]]]:
        """Variant, form, and what makes its file for `size` images."""
        made = self.baselines
        found = [(BASE, exporter, functools.partial(made.exported, exporter, size)) for exporter in EXPORTERS]
        for name, (_, _, exporters) in QUANTIZERS.items():
            if name not in self.skip:
                found += [
                    (f"ORT int8 {name}", exporter, functools.partial(made.quantized, name, exporter, size))
                    for exporter in exporters
                ]
        return [*found, *((name, "", functools.partial(Path, path)) for name, path in self.ours.items())]

    def onnx(self, variant: str, form: str, mode: str, graph: Graph) -> Candidate:
        """A file in one mode."""
        details = [form, "" if graph.nhwc else "NHWC off", "" if graph.fixed is None else "batch fixed"]
        label = ", ".join(filter(None, details)) or "as it is"
        run = functools.partial(start, graph, self.subject.names, mode, self.cores, self.pool)
        return Candidate(variant, label, mode, run, graph)


def started(running: Running, ring: Sequence[Inputs], reference: Tensor) -> tuple[Callable[[int], object], float]:
    """Calls on the ring of inputs, and SQNR of the predictions in dB.

    Raises:
        ValueError: a prediction of another shape, or one that is not finite.
    """
    found = torch.cat([running.predict(inputs) for inputs in ring])
    if found.shape != reference.shape or not bool(found.isfinite().all()):
        raise ValueError(f"predicts {list(found.shape)}, expected finite values {list(reference.shape)}")
    prepared = [running.prepare(inputs) for inputs in ring]
    return (lambda number: running.call(prepared[number % len(prepared)])), sqnr(reference, found)


def best(candidates: Sequence[Candidate], trial: Times) -> list[Candidate]:
    """The fastest form of each variant in each mode."""
    chosen: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        other = chosen.get((candidate.variant, candidate.mode))
        time = trial.microseconds[candidate.key].median
        if other is None or time < trial.microseconds[other.key].median:
            chosen[candidate.variant, candidate.mode] = candidate
    order = list(dict.fromkeys(c.variant for c in candidates))
    return sorted(chosen.values(), key=lambda c: order.index(c.variant))


def rows(chosen: Sequence[Candidate], times: Times, quality: dict[str, float]) -> list[dict[str, Any]]:
    """One row per variant and mode; speed-ups come from turns of the same round as the base in its best mode."""
    fastest: dict[str, str] = {}
    for c in sorted(chosen, key=lambda c: times.microseconds[c.key].median):
        fastest.setdefault(c.variant, c.key)
    base = times.microseconds[fastest[BASE]].samples
    found = []
    for c in chosen:
        timing = times.microseconds[c.key]
        milliseconds = Timing(tuple(value / 1e3 for value in timing.samples))
        speedup = Timing(tuple(b / own for b, own in zip(base, timing.samples, strict=True)))
        found.append({
            "variant": c.variant, "form": c.form, "mode": c.mode, "best_mode": fastest[c.variant] == c.key,
            "milliseconds": milliseconds.to_json(), "times_faster": speedup.to_json(), "stable": times.warm[c.key],
            "sqnr_db": finite(quality[c.key]),
            "file_bytes": None if c.graph is None else c.graph.path.stat().st_size,
            "operators": None if c.graph is None else c.graph.operators(),
        })  # fmt: skip
    return found


def finite(value: float) -> float | None:
    """JSON has no infinity: an exact match is null."""
    return None if math.isinf(value) else round(value, 2)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
