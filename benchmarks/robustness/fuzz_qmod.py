"""Mutated ``.qmod`` files through everything that reads one: load, forward calls, inspect, verify.

    TRITON_INTERPRET=1 python -m benchmarks.robustness.fuzz_qmod --mutants 100000 --output FILE.json

A mutant is good when it is refused with an `ArtifactError` that names the file, or when everything works. Bad are other
exceptions, crashes, more than 5 CPU seconds, and address space beyond twice what the file and the limits declare
(``RLIMIT_AS`` around each step, see `fork_server`). Of an accepted launch plan each changed launch is run by Triton's
interpreter without memory, and what it touches must lie in its buffers (`touched`). Mutant N of a seed is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness import fork_server, seeds
from benchmarks.robustness.mutate_qmod import mutant
from benchmarks.robustness.qmod_file import take_apart
from benchmarks.robustness.touched import TooLong, touched
from edadm_compile.calibration.sampler import make_scheduler
from edadm_compile.driver import verify
from edadm_compile.errors import ArtifactError, EdadmError
from edadm_compile.ir.ops import FLOAT_OPS, LOWERED_OPS, QDQ_OPS
from edadm_compile.ir.program import get_constant
from edadm_compile.kernels import constants
from edadm_compile.kernels.launch import LaunchPlan, Operand
from edadm_compile.kernels.plan_check import SLACK
from edadm_compile.report import tables
from edadm_compile.runtime.artifact import Artifact, read
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.session import from_artifact

#: Small bounds, so that what a file may take is known: a value of at most 4 MiB.
LIMITS = Limits(header=4 << 20, values=200_000, tensors=2_000, file=16 << 20, nodes=5_000, inflated=2 << 20, value=4 << 20,
                arena=64 << 20, steps=1_000)  # fmt: skip
#: What Python and its allocators take in pieces, and libraries on their first use, bytes.
_GRAIN = 48 << 20
#: Threads and arenas of ONNX Runtime.
_SESSION = 512 << 20


class Fuzzer:
    """Mutants of some files, by number.

    Args:
        files: by name.
        seed: of all mutants.
        save: folder for bad mutants.
        every: of so many mutants that load, one is printed, one called with ONNX Runtime, one compared as `verify` does.
    """

    def __init__(self, files: dict[str, Path], seed: int, save: Path, every: int = 16) -> None:
        torch.set_num_threads(1)
        self.seed, self.save, self.every = seed, save, every
        self.names = list(files)
        self.parts = {name: take_apart(path.read_bytes()).frozen() for name, path in files.items()}
        self.good = {name: read(path, LIMITS) for name, path in files.items()}
        sources = seeds.sources()
        self.references = {n: verify.reference_of(sources[n][0], good, 2, 0) for n, good in self.good.items()}
        self.operators = sorted(FLOAT_OPS | LOWERED_OPS | QDQ_OPS)
        self.path = Path(f"/dev/shm/edadm-fuzz-{os.getpid()}.qmod")
        self.launches = {name: {repr(x) for p in a.device.plans.values() for x in p.launches} for name, a in self.good.items() if a.device}  # fmt: skip

    def bytes_of(self, number: int) -> tuple[str, str, bytes]:
        """(file it comes from, kind of change, bytes) of a mutant."""
        rng = random.Random(f"{self.seed} {number}")
        name = rng.choices(self.names, [6, 1][: len(self.names)])[0]
        kind, data = mutant(self.parts[name], rng, self.operators)
        return name, kind, data

    def job(self, number: int) -> dict[str, Any]:
        """Try one mutant."""
        start = time.process_time()
        name, kind, data = self.bytes_of(number)
        self.path.write_bytes(data)
        outcome, detail = self.outcome(name, number, len(data))
        if outcome.startswith("bad"):
            self.keep(number, data)
        return {"kind": kind, "outcome": outcome, "detail": detail, "seconds": time.process_time() - start}

    def keep(self, number: int, data: bytes | None = None) -> None:
        """Save a mutant."""
        self.save.mkdir(parents=True, exist_ok=True)
        (self.save / f"{self.seed}-{number}.qmod").write_bytes(self.bytes_of(number)[2] if data is None else data)

    def outcome(self, name: str, number: int, size: int) -> tuple[str, str]:
        """What became of the file at `self.path`."""
        step, room = "load", 2 * (size + LIMITS.value) + _GRAIN
        try:
            with fork_server.AddressSpace(room):
                artifact = read(self.path, LIMITS)
                step = "inspect"
                self.inspect(artifact, number)
            step = "plan"
            traced = self.trace(name, artifact)
            step = "forward"
            with fork_server.AddressSpace(room + 8 * LIMITS.value):
                self.forward(artifact, "reference")
            if self.turn(number, 0):
                step = "onnxruntime"
                with fork_server.AddressSpace(room + 8 * LIMITS.value + _SESSION):
                    self.forward(artifact, "onnxruntime")
            if self.turn(number, 1):
                step = "verify"
                with fork_server.AddressSpace(room + 16 * LIMITS.value):
                    self.verify(name, artifact)
        except ArtifactError as error:
            named = step != "load" or str(self.path) in str(error)
            return ("refused" if step == "load" else f"refused at {step}") if named else "bad: unnamed", str(error)
        except EdadmError as error:
            if step in ("load", "inspect", "plan"):
                return f"bad: {type(error).__name__} at {step}", str(error)
            return f"refused at {step}", str(error)
        except BaseException as error:
            return f"bad: {type(error).__name__} at {step}", str(error)[:300]
        return "accepted", traced

    def turn(self, number: int, step: int) -> bool:
        """Whether one of the slow steps is done for this mutant."""
        return (number - step) % self.every == 0

    def inspect(self, artifact: Artifact, number: int) -> None:
        """The verb's report, printed for some."""
        report = tables.inspect_report(artifact, 1)
        json.dumps(report)
        if self.turn(number, 2):
            with contextlib.redirect_stdout(io.StringIO()):
                tables.print_inspect(report)

    def forward(self, artifact: Artifact, engine: str) -> None:
        """One call at the smallest batch."""
        model = from_artifact(artifact, engine=engine)
        rows = artifact.lowered.signature.min_batch
        inputs = []
        for spec in artifact.lowered.signature.inputs:
            inputs.append(torch.zeros((rows, *spec.shape)).to(spec.dtype))
        result = model.predict(*inputs)
        if not isinstance(result, torch.Tensor) or result.shape[0] != rows:
            raise ArtifactError(f"a result of {result!r}")

    def verify(self, name: str, artifact: Artifact) -> None:
        """The verb on a reference that was made for the good file."""
        make_scheduler(artifact.lowered.sampler)
        good = self.good[name]
        if (artifact.lowered.signature, artifact.lowered.sampler) == (good.lowered.signature, good.lowered.sampler):
            with verify.running("cannot be compared"):
                verify.compare(artifact, self.references[name], 0)

    def trace(self, name: str, artifact: Artifact) -> str:
        """Every launch that is not one of the good file's: what it touches lies in its memory."""
        if artifact.device is None:
            return "no plan"
        counts: Counter[str] = Counter()
        for plan in artifact.device.plans.values():
            for launch in plan.launches:
                if launch.kernel == "torch" or repr(launch) in self.launches[name] or launch.kernel.endswith("_sm90"):
                    continue
                try:
                    for role, (low, high) in touched(launch).items():
                        room = rooms(plan, launch.operands[role], artifact)
                        if low < -room[0] or high > room[1]:
                            raise AssertionError(f"{launch.kernel} touches {role} at {low} to {high}, has {room}")
                    counts["traced"] += 1
                except TooLong:
                    counts["too long to trace"] += 1
        return ", ".join(f"{n} {what}" for what, n in counts.items()) or "plans as they were"


def rooms(plan: LaunchPlan, operand: Operand, artifact: Artifact) -> tuple[int, int]:
    """Bytes in front of and behind an operand's first element, computed without `edadm_compile.kernels.plan_check`."""
    before = operand.offset * operand.dtype.itemsize
    if operand.space == "arena":
        size = plan.buffers[int(operand.key)].size
    elif operand.space == "constant":
        made = constants.make(
            plan.constants[str(operand.key)], lambda n: get_constant(artifact.lowered.graph_module, n), "cpu"
        )
        size = made.numel() * made.element_size() + SLACK
    elif operand.space == "counter":
        size = 4 * plan.counters
    else:
        shape, dtype = (plan.output, torch.float32) if operand.space == "output" else plan.inputs[str(operand.key)]
        size = torch.Size(shape).numel() * dtype.itemsize
    return before, size - before


def summary(fuzzer: Fuzzer, count: int, results: dict[int, Any], seconds: float) -> dict[str, Any]:
    """The result file."""
    outcomes: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    traced: Counter[str] = Counter()
    slowest, bad = 0.0, []
    spent: Counter[str] = Counter()
    for number, result in sorted(results.items()):
        if isinstance(result, str):
            fuzzer.keep(number)
            result = {"kind": fuzzer.bytes_of(number)[1], "outcome": f"bad: {result}", "detail": "", "seconds": 0.0}
        outcome = result["outcome"]
        outcomes[outcome] += 1
        kinds.setdefault(result["kind"], Counter())[outcome] += 1
        slowest = max(slowest, result["seconds"])
        spent[f"{result['kind']} {outcome}"] += result["seconds"]
        if outcome == "accepted":
            traced[result["detail"]] += 1
        elif outcome.startswith("bad"):
            bad.append({"number": number, "kind": result["kind"], "outcome": outcome, "detail": result["detail"][:300]})
        else:
            reasons[_reason(result["detail"])] += 1
    return {
        "mutants": count, "first": min(results, default=0), "seed": fuzzer.seed, "every": fuzzer.every, "outcomes": dict(outcomes.most_common()), "bad": bad,
        "by_kind": {k: dict(c.most_common()) for k, c in sorted(kinds.items())}, "accepted": dict(traced.most_common()),
        "different_reasons": len(reasons), "reasons": dict(reasons.most_common(60)),
        "cpu_seconds": {k: round(v, 2) for k, v in spent.most_common()}, "slowest_cpu_seconds": round(slowest, 3), "wall_seconds": round(seconds, 1), "torch": torch.__version__,
    }  # fmt: skip


def _reason(text: str) -> str:
    """A message without its names and numbers."""
    words = text.partition(".qmod")[2] if ".qmod" in text else text
    return " ".join("#" if any(c.isdigit() or c in "'\"[({" for c in w) else w for w in words[:160].split())[:90]


def main() -> int:
    """Command line; exits with 1 when a mutant was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seconds", type=float, help="stop after this time instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=16, help="slow steps for one of so many mutants that load")
    parser.add_argument("--cache", type=Path, default=Path("build/fuzz"), help="folder of the files to mutate")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz/bad"), help="folder for bad mutants")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    fuzzer = Fuzzer(seeds.make(given.cache), given.seed, given.save, given.every)
    start, results = time.monotonic(), {}
    numbers = range(given.first, given.first + given.mutants)
    for number, result in fork_server.run(numbers, fuzzer.job):
        results[number] = result
        if isinstance(result, str) or result["outcome"].startswith("bad"):
            print(number, result, flush=True)
        if len(results) % 5000 == 0:
            print(f"{len(results)} mutants, {time.monotonic() - start:.0f} s", flush=True)
        if given.seconds is not None and time.monotonic() - start > given.seconds:
            break
    fuzzer.path.unlink(missing_ok=True)
    found = summary(fuzzer, len(results), results, time.monotonic() - start)
    text = json.dumps(found, indent=1)
    if given.output is not None:
        given.output.write_text(text + "\n")
    print(text)
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
