"""Two compiled files of one model, W8A8 and W4A8, in turns in one process: what 4-bit weights cost or save.

python -m benchmarks.gpu.widths --w8 FILE.qmod --w4 FILE.qmod --batch 1,8,64 --out FILE.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from edadm_compile.driver import bench_inputs, contenders
from edadm_compile.driver.machine import Device, describe_machine, pick_device
from edadm_compile.evaluate.timing import Rules, interleave
from edadm_compile.runtime.artifact import read


def measure(files: dict[str, Path], batches: tuple[int, ...], rounds: int, device: Device) -> dict[str, Any]:
    """Times of each file at each batch size, and their ratio to the first one's in the same round."""
    programs = {name: read(path).lowered for name, path in files.items()}
    made = {
        name: replace(contenders.our_contenders(path, device.kind, programs[name])[0], name=name)
        for name, path in files.items()
    }
    models = {name: contender.build() for name, contender in made.items()}
    rows = []
    for batch in batches:
        calls = {}
        for name, contender in made.items():
            drawn = bench_inputs.draw(programs[name], batch, bench_inputs.RING, 0)
            ring = [contender.place(inputs, device.kind) for inputs in drawn]
            ring = [[*inputs[:2], *ring[0][2:]] for inputs in ring]
            calls[name] = lambda i, model=models[name], ring=ring: model(*ring[i % len(ring)])
        times = interleave(calls, device.clock, Rules(rounds=rounds, warm_time=5e6))
        rows.append({"batch": batch, **times.to_json(next(iter(files)))})
        print(json.dumps(rows[-1]), flush=True)
    sizes = {
        name: {"file": path.stat().st_size, "weights": made[name].weight_bytes} for name, path in files.items()
    }  # fmt: skip
    return {"machine": describe_machine(device), "bytes": sizes, "batches": rows}


def main(argv: list[str] | None = None) -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--w8", type=Path, required=True)
    parser.add_argument("--w4", type=Path, required=True)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    batches = tuple(int(b) for b in args.batch.split(","))
    found = measure({"w8": args.w8, "w4": args.w4}, batches, args.rounds, pick_device(args.device))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
