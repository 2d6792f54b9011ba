"""The page: sections of plain values into the template, charts and their data beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from edadm_compile.errors import ArtifactError
from edadm_compile.report.html import charts, lists, verdict
from edadm_compile.report.html.charts import Series
from edadm_compile.report.html.scales import number, timestep
from edadm_compile.report.tables import human

#: Charts that a report may have.
KEYS = ("samples", "noise", "allocation", "scores", "blocks", "ranges", "sensitivity", "sizes", "times", "stages")


@dataclass(frozen=True)
class Plot:
    """A chart, the data it was drawn from, and what stands below it.

    Attributes:
        key: short name; also that of the JSON block and of its file.
        drawing: SVG or a list of bars.
        data: plain values.
    """

    key: str
    drawing: Any
    data: Any


def render(facts: Mapping[str, Any]) -> str:
    """One HTML page.

    Args:
        facts: from `edadm_compile.driver.report_facts.gather`.

    Returns:
        text without references to anything outside of it; what comes from a file is escaped.

    Raises:
        ArtifactError: facts that are not what the compiler writes: a manifest that somebody else wrote.
    """
    try:
        return _rendered(facts)
    except (jinja2.UndefinedError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"report: the manifest is not what edadm-compile writes ({type(error).__name__}: {str(error)[:200]}); "
            "recompile the model"
        ) from error


def _rendered(facts: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edadm_compile.report.html"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "human": human,
        "number": number,
        "decibel": verdict.decibel,
        "embedded": embedded,
        "breakable": breakable,
    }
    template = environment.get_template("report.html.j2")
    return template.render(
        facts=facts, tiles=verdict.tiles(facts), headline=verdict.headline(facts),
        sentences=verdict.sentences(facts),
        float_groups=verdict.float_groups(facts["layers"]), plots={**dict.fromkeys(KEYS), **plots(facts)}, rows=_rows(facts),
        numbers=_numbers(facts), between=lists.between(facts["times"]),
    )  # fmt: skip


def embedded(data: Any) -> Markup:
    """JSON for a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def breakable(name: str) -> Markup:
    """A layer name that may break behind its dots."""
    return Markup("<wbr>").join(part + "." for part in name.split(".")[:-1]) + Markup("<wbr>") + name.split(".")[-1]


def plots(facts: Mapping[str, Any]) -> dict[str, Plot]:
    """Every chart that the facts allow, by key."""
    widths = {row["layer"]: row["executed"] for row in facts["layers"]}
    found = [_samples(facts["samples"]), _noise(facts["noise"]), _allocation(facts), _scores(facts["selection"])]
    if facts["units"]:
        found.append(Plot("blocks", lists.block_losses(facts["units"]), {"units": facts["units"]}))
    if facts["ranges"] is not None:
        found.append(_ranges(facts))
    if facts["sensitivity"]:
        drawing = lists.sensitivities(facts["sensitivity"], widths)
        found.append(Plot("sensitivity", drawing, {"noise_to_signal": facts["sensitivity"]}))
    found.append(Plot("sizes", lists.sizes(facts["layers"]), [_size(r) for r in facts["layers"] if r["bytes"]]))
    found.append(Plot("times", lists.times(facts["times"], widths), facts["times"]))
    if facts["seconds"]:
        found.append(Plot("stages", lists.stages(facts["seconds"]), {"seconds": facts["seconds"]}))
    return {plot.key: plot for plot in found if plot is not None}


def data_files(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The data of every chart and of the table of layers by file name."""
    found = {f"{plot.key}.json": plot.data for plot in plots(facts).values()}
    return {**found, "layers.json": facts["layers"]}


def _size(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("layer", "executed", "bytes", "fp16_bytes")}


def _samples(samples: Mapping[str, Any] | None) -> Plot | None:
    if samples is None:
        return None
    data = {k: samples[k] for k in ("engine", "seed", "gain", "psnr_db")}
    return Plot("samples", None, {**data, "each_psnr_db": [p["psnr_db"] for p in samples["images"]]})


def _noise(noise: Mapping[str, Any] | None) -> Plot | None:
    if noise is None:
        return None
    series = Series("SQNR, dB", noise["per_step"], "quantized")
    title = f"Noise-prediction SQNR in dB over {len(noise['timesteps'])} timesteps"
    return Plot("noise", charts.lines(noise["timesteps"], [series], "SQNR, dB", title), noise)


def _timesteps(facts: Mapping[str, Any]) -> list[float]:
    if facts["selection"] is not None:
        return list(facts["selection"]["timesteps"])
    noise = facts["noise"]
    counts = facts["allocation"] or []
    same = noise is not None and len(noise["timesteps"]) == len(counts)
    return list(noise["timesteps"]) if same else list(range(len(counts)))


def _allocation(facts: Mapping[str, Any]) -> Plot | None:
    counts = facts["allocation"]
    if not counts:
        return None
    t = _timesteps(facts)
    title = f"Calibration samples chosen at each of {len(counts)} timesteps, {sum(counts)} in all"
    return Plot(
        "allocation", charts.columns(t, Series("samples", counts, "quantized"), "samples", title),
        {"timesteps": t, "samples": counts},
    )  # fmt: skip


def _scores(selection: Mapping[str, Any] | None) -> Plot | None:
    if selection is None or selection["density"] is None:
        return None
    series = [Series(name, selection[name], name) for name in ("density", "diversity")]
    title = "Density and diversity of the bottleneck features at each timestep, both scaled to 0 to 1"
    drawing = charts.lines(selection["timesteps"], series, "score, 0 to 1", title, 190, zero=True)
    return Plot("scores", drawing, selection)


def _ranges(facts: Mapping[str, Any]) -> Plot:
    """The layer that is shown first is the most sensitive one with a range."""
    found = facts["ranges"]
    names = [layer["layer"] for layer in found["layers"]]
    sensitivity = facts["sensitivity"] or {}
    first = max(range(len(names)), key=lambda i: (sensitivity.get(names[i], 0.0), -i)) if names else 0
    drawing = None
    if names:
        title = f"Range of what {names[first]} reads over the timesteps"
        drawing = charts.ranges(found["timesteps"], found["layers"][first], title)
    return Plot("ranges", {"svg": drawing, "names": names, "first": first}, found)


def _rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of layers with what was measured of each."""
    sensitivity, times = facts["sensitivity"] or {}, facts["times"]
    ranged = {layer["layer"] for layer in facts["ranges"]["layers"]} if facts["ranges"] else set()
    return [
        {
            **row, "number": number_, "shape": " × ".join(map(str, row["shape"])),
            "sensitivity": sensitivity.get(row["layer"]), "microseconds": times["layers"].get(row["layer"]),
            "macs": times["macs"].get(row["layer"]), "ranged": row["layer"] in ranged,
        }
        for number_, row in enumerate(facts["layers"], 1)
    ]  # fmt: skip


def _numbers(facts: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Rows of the tables below line charts."""
    found: dict[str, list[list[Any]]] = {"noise": [], "calibration": []}
    if facts["noise"] is not None:
        pairs = zip(facts["noise"]["timesteps"], facts["noise"]["per_step"], strict=False)
        found["noise"] = [[i, timestep(t), verdict.decibel(v)] for i, (t, v) in enumerate(pairs, 1)]
    counts, selection = facts["allocation"] or [], facts["selection"] or {}
    scores = [selection.get(key) or [None] * len(counts) for key in ("density", "diversity")]
    for i, (t, count, *pair) in enumerate(zip(_timesteps(facts), counts, *scores, strict=False), 1):
        found["calibration"].append([i, timestep(t), count, *(number(v) for v in pair)])
    return found
