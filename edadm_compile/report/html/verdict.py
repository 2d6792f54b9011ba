"""What the top of a report says: the figures that matter, and sentences about what runs and what does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edadm_compile.report.html.scales import number, timestep
from edadm_compile.report.tables import human


@dataclass(frozen=True)
class Tile:
    """One figure: what it is, its value with a unit, and a remark."""

    label: str
    value: str
    note: str


def decibel(value: float | None) -> str:
    """A ratio in dB; infinite ones are stored as None."""
    return "exact" if value is None else f"{value:.1f} dB".replace("-", "−")


def tiles(facts: Mapping[str, Any]) -> list[Tile]:
    """The figures of the summary, as far as the report has them."""
    found = []
    if facts["noise"] is not None:
        found.append(Tile("Prediction SQNR", decibel(facts["noise"]["sqnr"]), _worst(facts["noise"])))
    if facts["samples"] is not None:
        psnr, count = facts["samples"]["psnr_db"], len(facts["samples"]["images"])
        note = f"median PSNR of {count} pairs to the float model; worst {decibel(psnr['worst'])}"
        found.append(Tile("Image PSNR", decibel(psnr["median"]), note))
    totals = facts["totals"]
    if totals["ratio_to_fp16"]:
        note = f"of fp16: {human(totals['fp16_bytes'])} → {human(totals['bytes'])} for quantized layers"
        found.append(Tile("Weight size", f"{100 * totals['ratio_to_fp16']:.1f} %", note))
    integers, running = _integers(facts)
    folded = totals["folded_layers"]
    note = f"{totals['float_layers']} in float" + (f"; {folded} more folded into tables" if folded else "")
    found.append(Tile("Layers in integers", f"{integers} of {running}", note))
    if facts["times"]["kind"] == "measured":
        layers, between = (sum(facts["times"][k].values()) for k in ("layers", "between"))
        whole = layers + between
        share = f"{100 * layers / whole:.0f} % of it in layers" if whole else ""
        found.append(Tile("Time of one call", f"{number(whole / 1e3)} ms", f"ONNX Runtime, one thread; {share}"))
    return found


def _products(rows: Sequence[Mapping[str, Any]]) -> int:
    """Products of two activations in integers: they have no weight and are not among the quantized layers."""
    return sum(r["executed"] not in ("float", "table") and not r["fp16_bytes"] for r in rows)


def _worst(noise: Mapping[str, Any]) -> str:
    known = [(v, t) for v, t in zip(noise["per_step"], noise["timesteps"], strict=False) if v is not None]
    if not known:
        return "exact at every step"
    value, t = min(known)
    return f"over all steps; worst {decibel(value)} at t = {timestep(t)}"


def headline(facts: Mapping[str, Any]) -> str:
    """What runs, how small and how good it is, in one sentence."""
    integers, running = _integers(facts)
    found = f"{integers} of {running} layers run in integers"
    ratio = facts["totals"]["ratio_to_fp16"]
    if ratio:
        found += f", their weights take {100 * ratio:.1f} % of their fp16 size"
    noise = facts["noise"]
    if noise is None:
        return f"{found}; the error was not measured."
    if noise["sqnr"] is None:
        return f"{found}, and predictions equal the float model's."
    return f"{found}, and the prediction error carries {number(100 * 10 ** (-noise['sqnr'] / 10), 2)} % of the prediction's energy."


def _integers(facts: Mapping[str, Any]) -> tuple[int, int]:
    """Layers that run in integers, and layers that run."""
    totals = facts["totals"]
    integers = totals["quantized_layers"] + _products(facts["layers"])
    return integers, integers + totals["float_layers"]


def sentences(facts: Mapping[str, Any]) -> list[str]:
    """What was compiled, and what runs."""
    config, source = facts["config"], facts["source"]
    name = source.get("file")
    origin = f"{source.get('class', 'The model')}{f' from {name}' if name else ''}"
    found = [
        f"{origin} ({source['parameters']:,} parameters) was compiled to {config['weight_bits']}-bit weights and "
        f"{config['act_bits']}-bit activations, method {config['method']}; weights of quantized layers have "
        f"{facts['average_bits']:.2f} bits on average."
    ]
    widths: dict[str, int] = {}
    for row in facts["layers"]:
        widths[row["executed"]] = widths.get(row["executed"], 0) + 1
    integers = [f"{n} as {w}" for w, n in sorted(widths.items()) if w not in ("float", "table")]
    codes = " (weights w and activations a of so many bits)" if integers else ""
    found.append(f"Layers in integers: {', '.join(integers) or 'none'}{codes}.")
    return found


def float_groups(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Layers that do not run in integers, by reason."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["executed"] in ("float", "table"):
            groups.setdefault(row["note"] or "no reason recorded", []).append(row["layer"])
    return list(groups.items())
