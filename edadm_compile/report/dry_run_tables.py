"""Terminal output of ``compile --dry-run``."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.table import Table

from edadm_compile.ir.program import text_of
from edadm_compile.report.tables import console, human


def print_dry_run(plan: dict[str, Any]) -> None:
    """Print what a compilation would take and give."""
    out = console()
    table = Table(show_header=False, title=f"{plan['output']}: not compiled", title_justify="left")
    for row in _rows(plan):
        table.add_row(*row)
    out.print(table)
    for reason, count in Counter(plan["float_layers"].values()).items():
        out.print(f"float: {count} x {reason}", highlight=False)


def _rows(plan: dict[str, Any]) -> list[tuple[str, str]]:
    layers = ", ".join(f"{count} {width}" for width, count in plan["layers"].items())
    bits = f"{plan['average_weight_bits']:.2f} bits on average"
    if plan["widths"] == "measured":
        bits += " (measurement decides which layers have 8)"
    memory, sizes, samples = plan["memory"], plan["bytes"], plan["samples"]
    stages = ", ".join(f"{name} {_duration(s)}" for name, s in plan["seconds"].items() if s >= 0.5)
    peaks = ", ".join(f"{name} {_gigabytes(b)}" for name, b in memory["stages"].items())
    return [
        ("method", f"{plan['method']} {plan['config']}"),
        ("model", f"{plan['parameters']:,} parameters, {plan['nodes']} nodes"),
        *([("shapes", "; ".join(map(text_of, plan["shapes"])))] if len(plan["shapes"]) > 1 else []),
        ("layers", layers),
        ("weights", bits),
        ("blocks", f"{plan['blocks']} to reconstruct"),
        ("calibration", f"{samples['collected']} rows, {samples['scored']} scored at {samples['steps']} steps"),
        ("time", f"about {_duration(plan['total_seconds'])} on this machine as it is now ({stages})"),
        ("peak memory", f"about {_gigabytes(memory['peak'])} ({peaks})"),
        *_disk(plan),
        ("file", f"about {human(sizes['file'])}, {human(sizes['fp16_parameters'])} in fp16{_code(plan['gpu_code'])}"),
    ]


def _disk(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """What lies in the working folder, where something does."""
    rows = []
    if plan["memory"]["spilled"]:
        rows.append(("on disk", f"{_gigabytes(plan['memory']['spilled'])} of caches in {plan['workdir']}"))
    if plan["resumed"]:
        blocks = sum(name.startswith("reconstruct.") for name in plan["resumed"])
        others = [name.replace("_", " ") for name in plan["resumed"] if not name.startswith("reconstruct.")]
        found = ", ".join([*others, *([f"{blocks} blocks"] if blocks else [])])
        rows.append(("resumed", f"{found} from {plan['workdir']}; the time is that of the rest"))
    return rows


def _code(code: dict[str, Any]) -> str:
    if not code["targets"]:
        return "; no GPU code"
    text = f"; GPU code {human(code['bytes'])} of it: {code['kernels']} kernels for {', '.join(code['targets'])}"
    return text + (f", {code['missing']} to compile" if code["missing"] else ", all in the cache")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
