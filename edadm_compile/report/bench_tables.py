"""Tables of the measuring verbs, bench and tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edadm_compile.report.tables import console, human

#: Launches shown of a plan; the others are summed up.
_SHOWN = 25


def print_bench(result: Mapping[str, Any]) -> None:
    """Print what `bench` measured."""
    out = console()
    machine = result["machine"]
    where = machine.get("gpu") or machine["processor"]
    out.print(
        f"{result['artifact']} ({human(result['file_bytes'])}) on {where}; torch {machine['torch']}, triton "
        f"{machine['triton']}, {machine['threads']} CPU thread(s)",
        highlight=False,
    )
    if result["note"]:
        out.print(f"note: {result['note']}", highlight=False)
    for group in result["batches"]:
        out.print(_contenders(group))
        for row in group["rows"]:
            if row.get("failed"):
                out.print(f"not measured: {row['contender']}: {row['failed']}", highlight=False)
            elif row.get("stable") is False:
                out.print(f"not stable after warm-up: {row['contender']}", highlight=False)
    for batch, rows in result.get("kernels", {}).get("plans", {}).items():
        out.print(_launches(batch, rows))
        out.print(_by_kernel(rows))
    if "kernels" in result:
        _print_ceilings(result["kernels"]["ceilings"])


def _contenders(group: Mapping[str, Any]) -> Table:
    table = Table(title=f"batch {group['batch']} ({group['plan']})", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for name in (
        "ms", "p10 to p90", "ratio to ours", "p10 to p90", "images/s", "peak", "weights", "first call, s",
        "dB to reference", "dB to float",
    ):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=" to " in name)
    for row in group["rows"]:
        if row.get("failed"):
            continue
        time, ratio = row["microseconds"], row["ratio"]
        table.add_row(
            row["contender"], f"{time['median'] / 1e3:.3f}", f"{time['p10'] / 1e3:.3f} to {time['p90'] / 1e3:.3f}",
            f"{ratio['median']:.2f}", f"{ratio['p10']:.2f} to {ratio['p90']:.2f}", f"{row['images_per_second']:.1f}",
            "" if row["peak_bytes"] is None else human(row["peak_bytes"]), human(row["weight_bytes"]),
            f"{row['first_call_seconds']:.2f}", _db(row["sqnr_to_reference_db"]), _db(row["sqnr_to_float_db"]),
        )  # fmt: skip
    return table


def _launches(batch: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"batch {batch}: slowest launches, each alone", title_justify="left")
    for name in ("launch", "kernel", "layer", "µs", "of the step", "GOP", "MB", "of the peak", "tile"):
        table.add_column(name, justify="left" if name in ("kernel", "layer", "tile", "of the peak") else "right")
    for row in rows[:_SHOWN]:
        if "microseconds" not in row:
            continue
        step = "once" if row["once_per_prompt"] else f"{100 * (row['share_of_step'] or 0):.1f} %"
        tile = " ".join(f"{key.removeprefix('BLOCK_')}{value}" for key, value in row["tile"].items())
        table.add_row(
            str(row["index"]), row["kernel"], row["layer"][-48:], f"{row['microseconds']:.1f}", step,
            f"{row['operations'] / 1e9:.2f}" if row["operations"] else "", f"{row['bytes'] / 1e6:.2f}",
            f"{100 * row['share_of_peak']:.0f} % of {row['ceiling']}", tile,
        )  # fmt: skip
    return table


def _by_kernel(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="by kernel", title_justify="left")
    for name in ("kernel", "launches", "µs"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    sums: dict[str, list[float]] = {}
    for row in rows:
        if "microseconds" in row and not row["once_per_prompt"]:
            sums.setdefault(row["kernel"], []).append(row["microseconds"])
    for kernel, times in sorted(sums.items(), key=lambda item: -sum(item[1])):
        table.add_row(kernel, str(len(times)), f"{sum(times):.1f}")
    table.add_row("all", str(sum(map(len, sums.values()))), f"{sum(map(sum, sums.values())):.1f}")
    return table


def _print_ceilings(found: Mapping[str, Any]) -> None:
    console().print(
        f"ceilings measured here: int8 {found['int8_operations_per_second'] / 1e12:.0f} TOP/s "
        f"({found['int8_reached_by']}), bf16 {found['bf16_operations_per_second'] / 1e12:.0f} TFLOP/s, copy "
        f"{found['copy_bytes_per_second'] / 1e9:.0f} GB/s",
        highlight=False,
    )


def print_tune(result: Mapping[str, Any]) -> None:
    """Print what `tune` found."""
    out = console()
    table = Table(title=f"tiles for {result['gpu']} ({result['arch']})", title_justify="left")
    for name in ("shape", "built-in, µs", "best, µs", "gain", "tried", "tile"):
        table.add_column(name, justify="left" if name in ("shape", "tile") else "right")
    for key, found in sorted(result["microseconds"].items(), key=lambda item: item[1]["best"] - item[1]["built_in"]):
        tile = result["tiles"][key]
        sizes = " ".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in tile["sizes"].items())
        table.add_row(
            key, f"{found['built_in']:.1f}", f"{found['best']:.1f}", f"{found['built_in'] / found['best']:.2f}",
            str(found["tried"]), f"{sizes} warps{tile['num_warps']} stages{tile['num_stages']}",
        )  # fmt: skip
    out.print(table)
    before, after = result["step_microseconds"]["built_in"], result["step_microseconds"]["best"]
    out.print(f"matrix launches of all plans together: {before:.0f} → {after:.0f} µs", highlight=False)
    for key, reasons in result["rejected"].items():
        out.print(f"rejected for {key}: {len(reasons)} tile(s), first: {reasons[0]}", highlight=False)
    for row in result["faster_in_fp16"]:
        out.print(
            f"faster in fp16: {row['layer']}: {row['fp16_us']:.1f} µs against {row['integer_us']:.1f} µs with its "
            "quantizer (reported only)",
            highlight=False,
        )
    if result["untried"]:
        out.print(f"{len(result['untried'])} shape(s) not tried: {result['stopped']}", highlight=False)
    if result.get("output"):
        out.print(f"→ {result['output']}", highlight=False)


def print_prepared(found: Mapping[str, Any]) -> None:
    """Print what `tune --prepare` compiled."""
    out = console()
    out.print(
        f"{found['kernels']} kernels for {found['candidates']} candidates of {found['shapes']} shapes ({found['arch']}, batch "
        f"{', '.join(map(str, found['batches']))}, Triton {found['triton']}) are in {found['cache']}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for reason in found["refused"]:
        out.print(f"left out: {reason}", highlight=False, soft_wrap=True)


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
