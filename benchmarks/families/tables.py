"""Tables of docs/families.md, from the result files; `benchmarks/render.py` writes and checks them."""

from __future__ import annotations

from typing import Any


def families_table(results: dict[str, Any]) -> str:
    """One line for each published architecture."""
    rows = list(results["rows"].values())
    commits = sorted({row["commit"] for row in rows})
    lines = [
        f"Full size, w4a8, {results['steps']} steps, other settings the defaults; torch {results['machine']['torch']}, commit {', '.join(commits)}",
        "([file](../benchmarks/results/cpu-2core/families.json), made by `benchmarks/families/table.py`).",
        "",
        "| | parameters | nodes | blocks | integer: conv, linear | folded into tables | float | launches a step | fp16 | file | capture, CPU s | AOT, core s | peak memory | caches on disk |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    return "\n".join([*lines, *map(_family, rows)])


def _family(row: dict[str, Any]) -> str:
    integer, left = row["kinds"]["integer"], row["kinds"]["float"]
    folded = row["layers"].get("table", 0)
    linear = integer.get("linear", 0) - folded
    others = ", ".join(f"{count} {kind}" for kind, count in left.items()) or "none"
    plan, sizes = row["plan"], row["bytes"]
    return (
        f"| {row['title']} | {row['parameters'] / 1e6:,.1f} M | {row['nodes']:,} | {row['blocks']} | {integer.get('conv2d', 0)}, {linear} "
        f"| {folded} | {others} | {plan['launches']} | {sizes['fp16'] / 1e6:,.0f} MB | {sizes['w4a8'] / 1e6:,.0f} MB | {row['cpu_seconds']:.0f} "
        f"| {row['aot_core_seconds']:.0f} | {row['memory']['peak'] / 1e9:.1f} GB | {row['memory']['spilled'] / 1e9:.1f} GB |"
    )


def reasons_list(results: dict[str, Any]) -> str:
    """Why layers stay float, each reason once."""
    reasons = sorted({reason for row in results["rows"].values() for reason in row["float_reasons"]})
    return "\n".join(f"* {reason}" for reason in reasons)


def memory_table(results: dict[str, Any]) -> str:
    """Expected and measured peaks."""
    lines = [
        f"One thread, {results['machine']['processor']}, torch {results['machine']['torch']}; the most that the process held (VmHWM), with interpreter and mapped weights",
        "([file](../benchmarks/results/cpu-2core/memory.json), made by `benchmarks/families/memory.py`).",
        "",
        "| | options | expected | measured | expected / measured | file: expected | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in results["cases"].items():
        options = " ".join([*case["options"], *case["settings"].replace("\n", " ").split()])
        lines.append(
            f"| {name} | `{options}` | {case['expected'] / 1e9:.2f} GB | {case['measured'] / 1e9:.2f} GB "
            f"| {case['expected_over_measured']:.2f} | {case['file']['expected'] / 1e6:.2f} MB | {case['file']['measured'] / 1e6:.2f} MB |"
        )
    return "\n".join(lines)
