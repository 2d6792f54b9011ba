"""Peak memory of compilations beside what ``compile --dry-run`` expects of them.

    python benchmarks/families/memory.py [CASE ...]

compiles each case in a process of its own with one thread, reads the most memory that this process held (VmHWM) and writes benchmarks/results/cpu-2core/memory.json. Cases that are not named keep what is there. Exit code 1
when an estimate is more than 20 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.families.architectures import ARCHITECTURES, Architecture, twin
from benchmarks.families.twins import write_model
from edadm_compile.driver.machine import Cpu, describe_machine

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "memory.json"
#: How far off an estimate may be.
LIMIT = 0.2


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        model: makes the model in a folder; returns its path and options of the command line.
        options: of ``compile``.
        settings: of the settings file.
    """

    model: Callable[[Path], tuple[Path, list[str]]]
    options: tuple[str, ...]
    settings: str = ""


def _digits(folder: Path) -> tuple[Path, list[str]]:
    return ROOT / "examples" / "digits" / "model.pt", []


def _random(architecture: Architecture) -> Callable[[Path], tuple[Path, list[str]]]:
    def make(folder: Path) -> tuple[Path, list[str]]:
        path, options = write_model(architecture, folder / "model")
        return path, [part for name, value in options.items() for part in (_FLAGS[name], str(value))]

    return make


_FLAGS = {"conditions": "--cond", "factory": "--factory"}
_SMALL = "[tdac]\ntrajectories = 8\n"
CASES = {
    "digits": Case(_digits, ("--w4a8", "--iters", "5", "--calib-samples", "64")),
    "DDIM CIFAR-10": Case(
        _random(ARCHITECTURES["ddim-cifar10"]),
        ("--w4a8", "--uniform", "--iters", "1", "--calib-samples", "32", "--steps", "4"),
        _SMALL + "[reconstruction]\nbatch = 8\n",
    ),
    "SD 1.5, reduced": Case(
        _random(twin(ARCHITECTURES["sd-1.5"], width=8)),
        ("--w4a8", "--iters", "2", "--calib-samples", "64", "--steps", "4"),
        _SMALL,
    ),
    "SD 1.5": Case(
        _random(ARCHITECTURES["sd-1.5"]),
        ("--w4a8", "--iters", "20", "--calib-samples", "8", "--steps", "2"),
        "[tdac]\ntrajectories = 1\n[reconstruction]\nbatch = 1\n",
    ),
}
#: Cases that take about an hour: run where they are named.
LONG = ("SD 1.5",)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Estimate and compile one case.

    Raises:
        RuntimeError: a command failed.
    """
    case = CASES[name]
    model, options = case.model(folder)
    settings = folder / "settings.toml"
    settings.write_text(case.settings)
    command = [
        "compile", str(model), *options, *case.options, "--config", str(settings), "--targets", "none", "--threads", "1",
        "--json", "-q", "-o", str(folder / "unet.qmod"),
    ]  # fmt: skip
    plan, _ = _run([*command, "--dry-run"], folder)
    made, peak = _run(command, folder)
    expected = plan["memory"]["peak"]
    return {
        "options": list(case.options), "settings": case.settings, "parameters": plan["parameters"],
        "expected": expected, "stage": plan["memory"]["stage"], "measured": peak,
        "expected_over_measured": round(expected / peak, 3),
        "file": {"expected": plan["bytes"]["file"], "measured": made["bytes"]["file"]},
    }  # fmt: skip


def _run(options: list[str], folder: Path) -> tuple[dict[str, Any], int]:
    """Run a command line that prints JSON in a process of its own; returns that and the most bytes the process held."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peak = folder / "peak"
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(peak), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: edadm-compile {' '.join(options)}")
    value: dict[str, Any] = json.loads(done.stdout)
    return value, int(peak.read_text())


def _child(peak: Path, options: list[str]) -> None:
    """The command line, and then the peak of this process: that of its parent would count in the system's own accounts."""
    from edadm_compile.cli import main as edadm_compile

    edadm_compile(options, standalone_mode=False)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak.write_text(str(1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    rows: dict[str, Any] = json.loads(given.output.read_text())["cases"] if given.output.exists() else {}
    machine = describe_machine(Cpu())
    commit = machine.pop("commit")
    names = given.cases or [name for name in CASES if name not in LONG]
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            rows[name] = {"commit": commit, **measure(name, Path(place))}
        print(name, json.dumps(rows[name]), flush=True)
        whole = {"machine": machine, "made_by": "benchmarks/families/memory.py", "cases": rows}
        given.output.write_text(json.dumps(whole, indent=2) + "\n")
    off = [n for n in names if abs(rows[n]["expected_over_measured"] - 1) > LIMIT]
    sys.exit(f"more than 20 % off: {', '.join(off)}" if off else 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
