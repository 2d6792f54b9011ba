"""ONNX Runtime in float and in its own 8 bits, torch, and our files: one model, one process, in turns.

    python -m benchmarks.onnxruntime.run --ours w8a8=unet.onnx --batch 1,4 --out FILE.json

Without --model the configuration of google/ddpm-cifar10-32 with random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.onnxruntime import machine, model, table
from benchmarks.onnxruntime.baselines import QUANTIZERS, Baselines, Calibration
from benchmarks.onnxruntime.compare import Comparison
from edadm_compile.driver.options import parse_batches
from edadm_compile.errors import EdadmError
from edadm_compile.evaluate.timing import Rules

_SKIPPABLE = [*QUANTIZERS, "eager", "inductor"]
_METHOD = (
    "candidates take turns in one process, inputs rotate; a turn is one untimed call and then the timed ones; "
    "milliseconds per call, median and p10 to p90 over rounds; times faster: ONNX Runtime fp32 in its best mode over "
    "the candidate in turns of the same round; threads: one call on all cores; callers: one session of one thread, "
    "called from one thread per core with a part of the batch each; the form of a variant is the fastest of a trial"
)


def main(argv: list[str] | None = None) -> None:
    """Compare, print, and write one JSON file."""
    args = _parser().parse_args(argv)
    before = {"load_average_before": os.getloadavg(), "idle_before": machine.idle()}
    warnings = _warnings(before["load_average_before"][0], before["idle_before"])
    for warning in warnings:
        _say(f"warning: {warning}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((args.workdir / "inductor").absolute()))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(args.threads)
    try:
        result = _compare(args, {**before, "warnings": warnings})
    except EdadmError as error:
        sys.exit(str(error))
    table.show(result)


def _compare(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """The result with everything in it; written after each batch size, so that an interruption keeps what is done."""
    ours = dict(_named(text) for text in args.ours)
    subject = model.load(args.model, args.steps, args.states)
    calibration = Calibration(args.calibration_states, args.calibration_rows, args.entropy_bins)
    result |= {
        "machine": machine.describe(), "method": _METHOD,
        "model": {
            "name": subject.name, "parameters": subject.source.parameters(), "digest": subject.digest(),
            "states": "trajectory" if subject.trajectory else "noise", "steps": subject.source.sampler.steps,
        },
        "settings": {
            "cores": args.threads, "rounds": args.rounds, "calls_in_a_turn": args.calls, "seed": args.seed,
            "skipped": args.skip, "calibration": asdict(calibration), "ours": {k: str(v) for k, v in ours.items()},
        },
        "batches": [],
    }  # fmt: skip
    rules = Rules(args.rounds, 1e12, args.calls, window=3, warm_time=args.warm * 1e6)
    baselines = Baselines.within(args.workdir, subject, calibration)
    comparison = Comparison(subject, baselines, ours, set(args.skip), args.threads, rules, args.seed, _say)
    for batch in parse_batches(args.batch) or (1,):
        group = comparison.batch(batch)
        if group.get("foreign_cores", 0.0) > machine.QUIET_CORES:
            others = f"others used {group['foreign_cores']:.2f} cores during the measurement"
            result["warnings"].append(f"batch {batch}: {others}")
        result["batches"].append(group)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=FILE.onnx", help="may be repeated")
    parser.add_argument("--model", type=Path, help="a checkpoint or diffusers folder instead of the random model")
    parser.add_argument("--steps", type=int, help="of the sampler (random model: 10); ours may know no other timesteps")
    parser.add_argument("--states", choices=("noise", "trajectory"), help="default: noise, with --model trajectory")
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads of a call, or callers")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=2, help="timed calls in a turn, after an untimed one")
    parser.add_argument("--warm", type=float, default=5.0, help="seconds of warm-up per candidate at most")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--skip", nargs="*", choices=_SKIPPABLE, default=[], help="baselines to leave out")
    parser.add_argument("--calibration-states", type=int, default=Calibration.states, help="timesteps")
    parser.add_argument("--calibration-rows", type=int, default=Calibration.rows, help="images at each")
    parser.add_argument("--entropy-bins", type=int, default=Calibration.entropy_bins)
    parser.add_argument("--workdir", type=Path, default=Path("build/benchmarks-onnxruntime"), help="cache")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not name or not Path(path).is_file():
        sys.exit(f"--ours: got {text!r}, expected NAME=FILE.onnx with a file that exists")
    return name, Path(path)


def _warnings(load: float, idle: dict[str, float]) -> list[str]:
    found = []
    if load > machine.QUIET_LOAD:
        found.append(f"the machine is not quiet: load average {load:.2f} before the run")
    if idle.get("foreign_cores", 0.0) > machine.QUIET_CORES:
        found.append(f"the machine is not quiet: others used {idle['foreign_cores']:.2f} cores before the run")
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
