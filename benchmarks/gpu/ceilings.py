"""What the machine can do at most.

python -m benchmarks.gpu.ceilings --out FILE.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu.run import FakeClock
from edadm_compile.driver import ceilings
from edadm_compile.driver.machine import Cpu, Gpu, describe_machine
from edadm_compile.driver.single_launch import GpuRunner, ReferenceRunner
from edadm_compile.evaluate.timing import EventClock, in_graph
from edadm_compile.kernels.targets import arch_of

#: Kernels in the graph whose gap is measured.
NODES = 300


def _replay(call: Callable[[], object], repeats: int) -> float:
    """Microseconds of one replay of a graph."""
    graph = in_graph(call, repeats)
    clock = EventClock()
    clock.measure(graph, 0, 3)
    return clock.measure(graph, 0, 20)


def main(argv: list[str] | None = None) -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, a fake clock")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.dry_run:
        found = ceilings.measure(ReferenceRunner(FakeClock()), "", side=64, copy=1 << 10)
        gap = ceilings.launch_gap(lambda call, nodes: float(nodes), torch.device("cpu"), NODES)
        machine = describe_machine(Cpu())
    else:
        found = ceilings.measure(GpuRunner(torch.device("cuda", 0)), arch_of(0))
        gap = ceilings.launch_gap(_replay, torch.device("cuda", 0), NODES)
        machine = describe_machine(Gpu())
    result = {"machine": machine, "dry_run": args.dry_run, **found, "microseconds_per_graph_node": gap}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
