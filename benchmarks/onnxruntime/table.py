"""The comparison on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edadm_compile.report.tables import console, human


def show(result: Mapping[str, Any]) -> None:
    """One table per batch size, and what could not run."""
    out = console()
    about, settings = result["machine"], result["settings"]
    versions = about["versions"]
    out.print(
        f"{result['model']['name']}, {result['model']['parameters'] / 1e6:.1f} M parameters, on {about['processor']} "
        f"({', '.join(about['instructions'])}), {settings['cores']} core(s); onnxruntime {versions['onnxruntime']}, "
        f"torch {versions['torch']}, commit {about['commit']}",
        highlight=False,
    )
    for group in result["batches"]:
        out.print(_table(group))
        if group["failed"]:
            out.print(f"not measured: {len(group['failed'])}", highlight=False)
        for key, why in group["failed"].items():
            out.print(f"  {key}: {why}", highlight=False, markup=False)
    for warning in result["warnings"]:
        out.print(f"warning: {warning}", style="yellow", highlight=False)


def _table(group: Mapping[str, Any]) -> Table:
    busy = f", others used {group['foreign_cores']:.2f} cores" if "foreign_cores" in group else ""
    table = Table(
        title=f"batch {group['batch']}{busy}",
        title_justify="left",
        caption="* best mode of the variant; times faster than the best mode of ORT fp32",
    )
    for name in ("variant", "form", "mode"):
        table.add_column(name)
    for name in ("ms", "p10 to p90", "times faster", "p10 to p90", "SQNR, dB", "file"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in group["rows"]:
        time, faster = row["milliseconds"], row["times_faster"]
        table.add_row(
            row["variant"], row["form"], row["mode"] + (" *" if row["best_mode"] else ""), f"{time['median']:.2f}",
            f"{time['p10']:.2f} to {time['p90']:.2f}", f"{faster['median']:.2f}",
            f"{faster['p10']:.2f} to {faster['p90']:.2f}",
            "equal" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            "" if row["file_bytes"] is None else human(row["file_bytes"]),
        )  # fmt: skip
    return table
