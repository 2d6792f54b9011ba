"""Mutated model files and folders through the frontend.

    python -m benchmarks.robustness.fuzz_inputs --mutants 10000 --output FILE.json

Checkpoint dictionaries (both formats of torch.save), ``.pt2`` archives, safetensors with a factory, diffusers folders. A
mutant is good when `load_source` refuses it with an `InputError`, or loads it. Bad are other exceptions, crashes, more than
5 CPU seconds (20 for archives), address space beyond twice the file and what the model of the good file takes, and a
pickle that ran. Mutant N of a seed is always the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.robustness import fork_server, input_files
from edadm_compile.errors import CaptureError, EdadmError, InputError
from edadm_compile.frontend import LoadOptions, load_source

#: What loading a good file takes beside it: the model, the exported program, caches of the first use; bytes.
_ROOM = 256 << 20
_MARK = Path("/dev/shm/edadm-fuzz-was-here")


class Fuzzer:
    """Mutants of some inputs, by number."""

    def __init__(self, files: dict[str, Path], seed: int, save: Path) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        self.files, self.seed, self.save = files, seed, save
        self.root = Path(f"/dev/shm/edadm-fuzz-{os.getpid()}")
        self.root.mkdir(exist_ok=True)
        shutil.copy(next(iter(files.values())).parent / "scheduler_config.json", self.root)
        for path in files.values():  # what libraries do on their first use is not the mutants'
            load_source(path, self.options(path.name))

    def options(self, name: str) -> LoadOptions:
        """How a file of that name is loaded."""
        factory = "benchmarks.robustness.input_files:chain" if name.endswith(".safetensors") else None
        shape = {"folder": (1, 8, 8), "model.pt2": None}.get(name, (1, 4, 4))
        return LoadOptions(shape=shape, steps=2, factory=factory)

    def write(self, number: int) -> tuple[str, Path, str]:
        """(name of the good file, the mutant, what was done)."""
        rng = random.Random(f"{self.seed} {number}")
        name = rng.choices(list(self.files), [5, 4, 2, 4, 2])[0]
        target = self.root / name
        shutil.rmtree(target, ignore_errors=True) if name == "folder" else target.unlink(missing_ok=True)
        return name, target, input_files.mutate(self.files[name], target, rng)

    def job(self, number: int) -> dict[str, Any]:
        """Try one mutant."""
        name, target, kind = self.write(number)
        size = sum(f.lstat().st_size for f in target.iterdir()) if target.is_dir() else target.stat().st_size
        start = time.process_time()
        detail = ""
        try:
            with fork_server.AddressSpace(2 * size + _ROOM):
                load_source(target, self.options(name))
            outcome = "loaded"
        except (InputError, CaptureError) as error:
            outcome, detail = "refused", str(error)
        except BaseException as error:
            kind_of = "wrong class" if isinstance(error, EdadmError) else "bad"
            outcome, detail = f"bad: {type(error).__name__} ({kind_of})", str(error)[:300]
        if _MARK.exists():
            _MARK.unlink()
            outcome = "bad: a pickle ran"
        if outcome.startswith("bad"):
            self.keep(target, number)
        return {
            "file": name,
            "kind": kind,
            "outcome": outcome,
            "detail": detail,
            "seconds": time.process_time() - start,
        }

    def keep(self, target: Path, number: int) -> None:
        """Save a mutant."""
        self.save.mkdir(parents=True, exist_ok=True)
        copy = self.save / f"{self.seed}-{number}-{target.name}"
        if target.is_dir():
            shutil.copytree(target, copy, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy(target, copy)


def summary(count: int, seed: int, results: dict[int, Any], seconds: float) -> dict[str, Any]:
    """The result file."""
    outcomes: Counter[str] = Counter()
    files: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    slowest, bad = 0.0, []
    for number, result in sorted(results.items()):
        if isinstance(result, str):
            result = {"file": "?", "kind": "?", "outcome": f"bad: {result}", "detail": "", "seconds": 0.0}
        outcomes[result["outcome"]] += 1
        files.setdefault(f"{result['file']}: {result['kind']}", Counter())[result["outcome"]] += 1
        slowest = max(slowest, result["seconds"])
        if result["outcome"].startswith("bad"):
            bad.append({"number": number, **{k: str(result[k])[:300] for k in ("file", "kind", "outcome", "detail")}})
        elif result["outcome"] == "refused":
            text = result["detail"].partition(result["file"])[2] or result["detail"]
            reasons[
                " ".join("#" if any(c.isdigit() or c in "'\"[({" for c in w) else w for w in text[:140].split())[:80]
            ] += 1
    return {
        "mutants": count, "seed": seed, "outcomes": dict(outcomes.most_common()), "bad": bad,
        "by_kind": {k: dict(c.most_common()) for k, c in sorted(files.items())},
        "different_reasons": len(reasons), "reasons": dict(reasons.most_common(40)),
        "slowest_cpu_seconds": round(slowest, 3), "wall_seconds": round(seconds, 1), "torch": torch.__version__,
    }  # fmt: skip


def main() -> int:
    """Command line; exits with 1 when a mutant was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--seconds", type=float, help="stop after this time instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("build/fuzz/inputs"), help="folder of the files to mutate")
    parser.add_argument("--save", type=Path, default=Path("build/fuzz/bad_inputs"), help="folder for bad mutants")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    fuzzer = Fuzzer(input_files.make(given.cache), given.seed, given.save)
    start, results = time.monotonic(), {}
    for number, result in fork_server.run(range(given.first, given.first + given.mutants), fuzzer.job):
        results[number] = result
        if isinstance(result, str) or result["outcome"].startswith("bad"):
            print(number, result, flush=True)
        if len(results) % 1000 == 0:
            print(f"{len(results)} mutants, {time.monotonic() - start:.0f} s", flush=True)
        if given.seconds is not None and time.monotonic() - start > given.seconds:
            break
    shutil.rmtree(fuzzer.root, ignore_errors=True)
    found = summary(len(results), given.seed, results, time.monotonic() - start)
    text = json.dumps(found, indent=1)
    if given.output is not None:
        given.output.write_text(text + "\n")
    print(text)
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
