"""Horizontal bars as rows of tables: block losses, sensitivities, sizes and times by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edadm_compile.report.html.scales import log_ends, log_share, number
from edadm_compile.report.tables import human

#: Rows of a list that are shown at once; the others unfold, but not for the sake of a few.
SHOWN, FEW = 16, 6


@dataclass(frozen=True)
class Bar:
    """One row.

    Attributes:
        name: layer or block.
        share: length of the bar, 0 to 100.
        text: the value with its unit.
        second: end of a second mark, 0 to 100, or None.
        note: a remark.
        style: class that gives the colour.
    """

    name: str
    share: float
    text: str
    second: float | None = None
    note: str = ""
    style: str = ""


@dataclass(frozen=True)
class BarList:
    """Rows and the labels of their common scale, as (position in percent, text)."""

    rows: list[Bar]
    marks: list[tuple[float, str]]

    @property
    def shown(self) -> int:
        """Rows that are shown at once."""
        return len(self.rows) if len(self.rows) <= SHOWN + FEW else SHOWN


def block_losses(units: Sequence[Mapping[str, Any]]) -> BarList:
    """Loss of each block before and after reconstruction, on a logarithmic scale."""
    ends = log_ends([v for u in units for v in (u["before"], u["after"])])
    rows = []
    for unit in units:
        before, after = unit["before"], unit["after"]
        change = 100 * (after / before - 1) if before > 0 else 0.0
        phase = unit.get("phase", "joint")
        note = "single layer" if unit["layers"] == 1 else f"{unit['kind']} of {unit['layers']} layers"
        told = "unchanged" if abs(change) < 0.5 else f"{change:+.0f} %".replace("-", "−")
        text = f"{number(before)} → {number(after)} ({told})"
        rows.append(
            Bar(unit["unit"], 100 * log_share(after, ends), text, 100 * log_share(before, ends),
                note if phase == "joint" else f"{note}, {phase}", "better" if after <= before else "worse")
        )  # fmt: skip
    return BarList(rows, _powers(ends))


def sensitivities(found: Mapping[str, float], widths: Mapping[str, str]) -> BarList:
    """Noise-to-signal ratio of the output with one layer rounded, largest first, on a logarithmic scale."""
    ends = log_ends(list(found.values()))
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        Bar(name, 100 * log_share(v, ends), number(v), note=widths.get(name, ""),
            style=f"stem {_colour(widths.get(name, ''))}")
        for name, v in ordered
    ]  # fmt: skip
    return BarList(rows, _powers(ends))


def sizes(rows: Sequence[Mapping[str, Any]]) -> BarList:
    """Stored bytes of each layer beside its fp16 size, largest first."""
    known = sorted((r for r in rows if r["bytes"]), key=lambda r: (-r["bytes"], r["layer"]))
    largest = max([r["fp16_bytes"] for r in known] + [r["bytes"] for r in known], default=1)
    return BarList(
        [
            Bar(r["layer"], 100 * r["bytes"] / largest, human(r["bytes"]), 100 * r["fp16_bytes"] / largest,
                f"{r['executed']}, {human(r['fp16_bytes'])} in fp16", _colour(r["executed"]))
            for r in known
        ],
        [(0.0, "0"), (50.0, human(largest / 2)), (100.0, human(largest))],
    )  # fmt: skip


def times(found: Mapping[str, Any], widths: Mapping[str, str]) -> BarList:
    """Microseconds of each layer, or its multiply-accumulates where no time was measured, largest first."""
    measured = found["kind"] == "measured"
    values = found["layers"] if measured else found["macs"]
    ordered = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    largest, whole = max(values.values(), default=1) or 1, sum(values.values()) or 1
    whole += sum(found["between"].values()) if measured else 0
    unit, scale = ("µs", 1.0) if measured else ("M MAC", 1e6)
    rows = [
        Bar(name, 100 * v / largest, f"{number(v / scale)} {unit}",
            note=f"{widths.get(name, '')}, {100 * v / whole:.1f} % of all", style=_colour(widths.get(name, "")))
        for name, v in ordered
    ]  # fmt: skip
    return BarList(
        rows, [(0.0, "0"), (50.0, number(largest / 2 / scale)), (100.0, f"{number(largest / scale)} {unit}")]
    )


def between(found: Mapping[str, Any]) -> BarList:
    """Microseconds by operator of what is between layers, largest first."""
    values = sorted(found["between"].items(), key=lambda item: (-item[1], item[0]))
    largest = max((v for _, v in values), default=1) or 1
    whole = sum(found["layers"].values()) + sum(v for _, v in values) or 1
    rows = [Bar(n, 100 * v / largest, f"{number(v)} µs", note=f"{100 * v / whole:.1f} % of all") for n, v in values]
    return BarList(rows, [])


def stages(seconds: Mapping[str, float]) -> BarList:
    """Seconds of each stage of the compilation, in order."""
    largest = max(seconds.values(), default=1.0) or 1.0
    rows = [Bar(name.replace("_", " "), 100 * v / largest, f"{v:.1f} s") for name, v in seconds.items()]
    return BarList(rows, [])


def _colour(executed: str) -> str:
    return "float-codes" if executed in ("float", "") else "wide-codes" if executed.startswith("w8") else "narrow-codes"


def _powers(ends: tuple[int, int]) -> list[tuple[float, str]]:
    count = ends[1] - ends[0]
    every = max(1, -(-count // 6))
    superscript = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return [
        (100 * (e - ends[0]) / count, f"10{str(e).translate(superscript)}") for e in range(ends[0], ends[1] + 1, every)
    ]
