"""torch.compile of the float models, made ready before anything is timed: one process per job, all at the same time.

    python -m benchmarks.gpu.compiled_baselines --job cifar10:1:max-autotune --artifact cifar10=FILE.qmod --out FILE.json

A job is MODEL:BATCH:MODE. What torch compiles lies in the folder of ``TORCHINDUCTOR_CACHE_DIR`` and ``TRITON_CACHE_DIR``,
where `end_to_end --ready FILE.json`, run with the same two variables, finds it. Inductor keeps the fastest of its candidates
by the least of many times, so that processes side by side cost it time but no choice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

#: Contender in `edadm_compile.driver.contenders.BASELINES` by mode of torch.compile.
NAMES = {"max-autotune": "torch.compile fp16", "reduce-overhead": "torch.compile reduce-overhead fp16"}
_WAIT = 0.5


def ready(path: Path, model: str, batch: int) -> list[str]:
    """Contenders whose code is in the cache, for one model and batch size."""
    jobs = json.loads(path.read_text())["jobs"]
    return [
        NAMES[mode] for mode in NAMES if "load_to_first_output" in jobs.get(f"{model}:{batch}:{mode}", {})
    ]  # fmt: skip


def child(job: str, artifact: Path, device: str) -> dict[str, float]:
    """One job in this process; seconds."""
    import torch

    from benchmarks.gpu.end_to_end import source
    from edadm_compile.driver import bench_inputs, contenders
    from edadm_compile.runtime.artifact import read

    model, batch, mode = job.split(":")
    made, program = source(model), read(artifact).lowered
    contender = contenders.baseline_contenders(made, device, [NAMES[mode]])[0]
    # As `bench` draws and places them: torch looks its code up by shapes, types and strides.
    few = bench_inputs.draw(program, min(int(batch), bench_inputs.CHECKED), 1, 0, made.conditions)[0]
    inputs = contender.place(bench_inputs.repeated(few, int(batch)), device)
    torch.zeros(1, device=device)
    start = time.perf_counter()
    with contenders.best_algorithms():
        contender.build()(*inputs).cpu()
    return {"load_to_first_output": time.perf_counter() - start}


def run(jobs: list[str], artifacts: dict[str, Path], limit: float, out: Path, device: str = "cuda") -> dict[str, Any]:
    """All jobs at once; those that are not done after `limit` seconds are stopped. Writes `out` whenever one ends."""
    start, found = time.monotonic(), {}
    running = {job: _start(job, artifacts[job.split(":")[0]], device) for job in jobs}
    while running:
        late = time.monotonic() - start > limit
        for job, process in list(running.items()):
            if late and process.poll() is None:
                process.kill()
                process.communicate()
                found[job] = {"failed": f"not ready after {limit:.0f} s"}
            elif process.poll() is None:
                continue
            else:
                found[job] = _said(process)
            del running[job]
            print(f"{time.monotonic() - start:.0f} s", job, json.dumps(found[job]), flush=True)
            out.write_text(json.dumps({"together": len(jobs), "cores": os.cpu_count(), "jobs": found}, indent=1) + "\n")
        time.sleep(_WAIT)
    return found


def _start(job: str, artifact: Path, device: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.compiled_baselines", "--child", job, "--device", device]
    return subprocess.Popen(
        [*command, "--artifact", f"{job.split(':')[0]}={artifact}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate()
    lines = output.strip().splitlines()
    if process.returncode or not lines:
        return {"failed": (errors.strip().splitlines() or ["no output"])[-1][:300]}
    return dict(json.loads(lines[-1]))


def main(argv: list[str] | None = None) -> None:
    """Run the jobs and write one JSON file; with --child be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--job", action="append", default=[], metavar="MODEL:BATCH:MODE", help=f"modes: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--artifact", action="append", required=True, metavar="MODEL=FILE", help="what it is compared with"
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for all of them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", metavar="JOB", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    artifacts = {name: Path(path) for name, path in (item.split("=", 1) for item in args.artifact)}
    if args.child:
        print(json.dumps(child(args.child, artifacts[args.child.split(":")[0]], args.device)))
        return
    for job in args.job:
        if job.count(":") != 2 or job.split(":")[2] not in NAMES or job.split(":")[0] not in artifacts:
            parser.error(f"--job {job}: MODEL:BATCH:MODE with a mode of {', '.join(NAMES)} and a model with --artifact")
    if args.out is None:
        parser.error("--out is needed")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run(args.job, artifacts, args.limit, args.out, args.device)


if __name__ == "__main__":
    main()
