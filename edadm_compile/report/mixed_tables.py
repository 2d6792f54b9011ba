"""Terminal output of an automatic choice of widths."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table


def print_mixed(out: Console, mixed: dict[str, Any] | None, quality: dict[str, Any] | None) -> None:
    """Print the layers with their widths and errors, then the curve of size and quality; nothing without a choice.

    Args:
        mixed: the report of `edadm_compile.passes.mixed_widths.choose_widths`.
        quality: the measured quality of the finished program, or None.
    """
    if mixed is None:
        return
    unit = "error (dB below the noise)" if mixed["measured"] else "weight error (not measured on the model)"
    table = Table(title=f"layers, {unit}", title_justify="left")
    for name in ("layer", "parameters", "widths", "narrow", "wide"):
        table.add_column(name, justify="left" if name in ("layer", "widths") else "right", overflow="fold")
    for row in mixed["layers"]:
        errors = [_error(e, mixed["measured"]) for e in row["errors"].values()]
        narrow, wide = ("", errors[0]) if row["fixed"] else errors
        widths = f"{row['widths']} fixed" if row["fixed"] else row["widths"]
        table.add_row(row["layer"], f"{row['parameters']:,}", widths, narrow, wide)
    out.print(table)
    out.print(_asked(mixed), highlight=False)
    measured = None if quality is None else quality["sqnr"]
    if mixed["min_sqnr"] is not None and measured is not None and measured < mixed["min_sqnr"]:
        out.print(
            f"note: the finished program has {_db(measured)}, less than the {mixed['min_sqnr']:g} dB asked for: the "
            f"prediction leaves out how errors add up; ask for {2 * mixed['min_sqnr'] - measured:.1f} dB",
            highlight=False,
        )
    if mixed["measured"]:
        points = ", ".join(f"{p['bits']:.2f} bits {_db(p['predicted_sqnr'])}" for p in mixed["curve"])
        out.print(f"best predicted by size: {points}", highlight=False)


def _asked(mixed: dict[str, Any]) -> str:
    wanted = (
        f"at most {mixed['budget_bits']:g} bits"
        if mixed["budget_bits"] is not None
        else f"at least {mixed['min_sqnr']:g} dB"
    )
    found = f"asked for {wanted}: {mixed['stored_bits']:.3f} stored bits per weight"
    if not mixed["measured"]:
        return f"{found}; too large a model to measure its layers, chosen by weight errors, no SQNR predicted"
    return f"{found}, predicted noise SQNR {_db(mixed['predicted_sqnr'])} before reconstruction"


def _error(value: float, measured: bool) -> str:
    if not measured:
        return f"{value:.1e}"
    return f"{-10 * math.log10(value):.1f}" if value > 0 else "exact"


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
