"""Every published architecture in full size, captured and taken through the passes by shapes alone.

    python benchmarks/families/table.py [FAMILY ...] [--arch sm_90] [--again]

writes benchmarks/results/cpu-2core/families.json, one child process for each family; rows that are there are kept, unless
they are named or `--again` is given. ``python benchmarks/render.py`` then writes the table of docs/families.md.

Weights: constants of up to 65,536 elements are random, larger ones are zeros that take no memory (pages that nobody
writes). Nothing here looks at their values: widths that measurement would decide are given to the smallest layers
(docs/families.md), and everything else follows from the graph. Memory and size are those that ``compile --dry-run`` expects;
benchmarks/families/memory.py compares such figures with measured ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":  # run as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.families.architectures import ARCHITECTURES, Architecture, build
from benchmarks.families.twins import conditions
from edadm_compile.config import QuantConfig
from edadm_compile.driver.device_code import DeviceOptions
from edadm_compile.driver.dry_run import estimate
from edadm_compile.driver.machine import Cpu, describe_machine
from edadm_compile.frontend import Encoded
from edadm_compile.frontend.checkpoint import diffusers_source
from edadm_compile.ir.program import SamplerSpec

RESULTS = Path(__file__).resolve().parents[1] / "results" / "cpu-2core" / "families.json"
#: Steps of the sampler that a row is compiled for.
STEPS = 50
#: Most bytes of caches in memory, as ``--memory 4GB``.
CACHES = 4_000_000_000
#: Larger constants are zeros.
_RANDOM = 1 << 16


def build_empty(architecture: Architecture) -> nn.Module:
    """The network in full size without memory for its large constants."""
    with torch.device("meta"):
        model = build(architecture)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_filled(value, generator), requires_grad=False))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, _filled(value, generator))
    return model


def _filled(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if value.is_floating_point() and value.numel() <= _RANDOM:
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    if value.dtype == torch.float32:  # torch would write its zeros, and take memory for them
        return torch.from_numpy(np.zeros(value.shape, np.float32))
    return torch.zeros(value.shape, dtype=value.dtype)


def row(architecture: Architecture, arch: str) -> dict[str, Any]:
    """One row: what ``compile --dry-run --w4a8 --memory 4GB`` says.

    Raises:
        EdadmError: of a family that cannot be compiled.
    """
    model = build_empty(architecture)
    sampler = SamplerSpec(dict(architecture.scheduler), STEPS)
    text = Encoded(conditions(architecture))
    source = diffusers_source(model, sampler, None, text, {"file": architecture.key})
    start = time.process_time()
    found = estimate(source, QuantConfig(), DeviceOptions((arch,), (1,)), memory=CACHES)
    used = time.process_time() - start
    code = found["gpu_code"]
    return {
        "title": architecture.title,
        "source": architecture.source,
        "parameters": found["parameters"],
        "nodes": found["nodes"],
        "blocks": found["blocks"],
        "layers": found["layers"],
        "kinds": found["kinds"],
        "float_reasons": sorted(set(found["float_layers"].values())),
        "average_weight_bits": found["average_weight_bits"],
        "bytes": {"fp16": found["bytes"]["fp16_parameters"], "w4a8": found["bytes"]["file"] - found["bytes"]["gpu_code"],
                  "gpu_code": found["bytes"]["gpu_code"]},
        "plan": {**code["plans"][0], "kernels": code["kernels"]},
        "aot_core_seconds": round(code["core_seconds"], 1),
        "cpu_seconds": round(used, 1),
        "memory": {"peak": found["memory"]["peak"], "stage": found["memory"]["stage"],
                   "spilled": found["memory"]["spilled"]},
    }  # fmt: skip


def measure(names: list[str], arch: str, output: Path) -> int:
    """Make rows and write the file after each; returns how many failed."""
    record = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    rows: dict[str, Any] = record["rows"]
    machine = describe_machine(Cpu())
    commit = machine.pop("commit")
    failed = 0
    for name in names:
        command = [sys.executable, "-W", "ignore", __file__, "--row", name, "--arch", arch]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed += 1
            print(f"{name} failed:\n{done.stderr}", file=sys.stderr, flush=True)
            continue
        rows[name] = {"commit": commit, "arch": arch, **json.loads(done.stdout.splitlines()[-1])}
        print(name, json.dumps(rows[name]), flush=True)
        ordered = {key: rows[key] for key in ARCHITECTURES if key in rows}
        whole = {
            "machine": machine,
            "made_by": "benchmarks/families/table.py",
            "steps": STEPS,
            "memory_limit": CACHES,
            "rows": ordered,
        }
        output.write_text(json.dumps(whole, indent=2) + "\n")
    return failed


def main() -> None:
    """Parse the command line and make rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[[], *ARCHITECTURES], metavar="FAMILY")
    parser.add_argument("--arch", default="sm_90", help="architecture of the launch plan (default sm_90)")
    parser.add_argument("--again", action="store_true", help="make every row again")
    parser.add_argument("--row", choices=list(ARCHITECTURES), help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(row(ARCHITECTURES[given.row], given.arch)))
        return
    there = set() if given.again or not given.output.exists() else set(json.loads(given.output.read_text())["rows"])
    names = given.families or [name for name in ARCHITECTURES if name not in there]
    sys.exit(1 if measure(names, given.arch, given.output) else 0)


if __name__ == "__main__":
    main()
