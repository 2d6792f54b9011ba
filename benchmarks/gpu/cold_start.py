"""Seconds from a new process to the first prediction, for a compiled file and for the float model.

    python -m benchmarks.gpu.cold_start --model cifar10 --artifact FILE.qmod --out FILE.json

Each contender runs in a process of its own, twice: the second run finds the caches that the first one left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("ours", "eager", "compile")


def child(way: str, model: str, artifact: Path, device: str, start: float) -> dict[str, float]:
    """In the new process: load, predict once; seconds since `start` (of time.time) at each stage."""
    import torch

    from benchmarks.gpu.end_to_end import source
    from edadm_compile.driver import contenders
    from edadm_compile.driver.bench_inputs import draw
    from edadm_compile.runtime.artifact import read

    loaded = read(artifact).lowered
    if device == "cuda":
        torch.zeros(1, device="cuda")
    stages = {"imported": time.time() - start}
    begin = time.perf_counter()
    if way == "ours":
        contender = contenders.our_contenders(artifact, device, loaded)[0]
    else:
        name = {"eager": 0, "compile": -1}[way]
        contender = contenders.baseline_contenders(source(model), device)[name]
    inputs = contender.place(draw(loaded, 1, 1, 0)[0], device)
    ready = time.perf_counter()
    predict = contender.build()
    predict(*inputs).cpu()
    stages["load_to_first_output"] = time.perf_counter() - ready
    stages["model_made_and_inputs"] = ready - begin
    stages["process_to_first_output"] = time.time() - start
    return stages


def measure(way: str, model: str, artifact: Path, device: str, limit: float) -> dict[str, Any]:
    """Run one child; what it said, or why it said nothing."""
    arguments = ["--child", way, "--model", model, "--artifact", str(artifact), "--device", device]
    command = [sys.executable, "-m", "benchmarks.gpu.cold_start", *arguments, "--start", str(time.time())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return dict(json.loads(lines[-1]))


def main(argv: list[str] | None = None) -> None:
    """Measure all ways and write one JSON file; with --child be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one process")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(args.child, args.model, args.artifact, args.device, args.start)))
        return
    if args.out is None:
        parser.error("--out is needed")
    result: dict[str, Any] = {"model": args.model, "device": args.device}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for way in args.ways.split(","):
        for number in ("first", "second"):
            found = measure(way, args.model, args.artifact, args.device, args.limit)
            result.setdefault(way, {})[number] = found
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(way, number, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
