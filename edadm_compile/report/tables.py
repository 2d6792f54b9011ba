"""Terminal output: summaries and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import Program, text_of
from edadm_compile.report.mixed_tables import print_mixed
from edadm_compile.report.truth import describe, totals, truth_table
from edadm_compile.runtime.artifact import Artifact


def console() -> Console:
    """A console for results (standard output), wide enough for tables when not a terminal."""
    # no markup: names come from files, and [brackets] in them are no colours
    found = Console(markup=False, emoji=False)
    return found if found.is_terminal else Console(markup=False, emoji=False, width=160)


def human(size: float) -> str:
    """Bytes as kB or MB."""
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def inspect_report(artifact: Artifact, size: int) -> dict[str, Any]:
    """Everything ``inspect`` shows, as plain values."""
    manifest = artifact.manifest
    config = manifest.get("config") or {}
    rows = truth_table(artifact.lowered, f"w{config.get('weight_bits')}a{config.get('act_bits')}")
    signature = artifact.lowered.signature
    return {
        "format": manifest.get("format"),
        "file_bytes": size,
        "inputs": [
            {"name": s.name, "shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")}
            for s in signature.inputs
        ],
        "shapes": [list(shape) for shape in artifact.shapes],
        "sampler": _sampler(artifact.lowered),
        "layers": rows,
        "totals": totals(rows),
        "device": describe(artifact.device),
        **{
            k: manifest.get(k)
            for k in (
                "average_bits",
                "warnings",
                "mixed_precision",
                "config",
                "source",
                "quality",
                "allocation",
                "versions",
                "computed_with",
            )
        },
    }


def print_shape(result: Mapping[str, Any]) -> None:
    """Say which shape a result is about, for a file that has several."""
    if len(result.get("shapes", ())) > 1:
        named = [text_of(shape) for shape in result["shapes"]]
        rest = "; ".join(name for name in named if name != text_of(result["shape"]))
        console().print(f"shape {text_of(result['shape'])}; the file also has {rest} (--shape)", highlight=False)


def print_inspect(report: dict[str, Any]) -> None:
    """Print the truth table, totals and provenance.

    Raises:
        ArtifactError: a file without provenance (one that Python code wrote without a manifest).
    """
    missing = [name for name in ("config", "source", "average_bits", "versions") if report[name] is None]
    if missing:
        raise ArtifactError(f"inspect: the file's manifest has no entry {missing[0]!r}; --json shows what it has")
    out = console()
    table = Table(
        title=f"{report['config']['method']} w{report['config']['weight_bits']}a{report['config']['act_bits']}",
        title_justify="left",
    )
    for name, justify in (
        ("layer", "left"),
        ("kind", "left"),
        ("shape", "left"),
        ("asked", "left"),
        ("runs", "left"),
        ("bytes", "right"),
        ("why", "left"),
    ):
        table.add_column(name, justify=justify, no_wrap=name == "layer", overflow="fold")  # type: ignore[arg-type]
    for row in report["layers"]:
        shape = "x".join(map(str, row["shape"]))
        colour = {"float": "yellow", "table": "cyan"}.get(row["executed"], "")
        table.add_row(
            row["layer"],
            row["kind"],
            shape,
            row["requested"],
            row["executed"],
            str(row["bytes"] or ""),
            row["note"],
            style=colour,
        )
    out.print(table)
    t, source = report["totals"], report["source"]
    out.print(
        f"{t['quantized_layers']} layers in integers, {t['folded_layers']} folded into tables, {t['float_layers']} in float; "
        f"average weight width {report['average_bits']:.2f} bits"
    )
    out.print(
        f"weights of quantized layers {human(t['bytes'])}, {t['ratio_to_fp16']} of fp16; file {human(report['file_bytes'])}"
    )
    print_mixed(out, report["mixed_precision"], report["quality"])
    print_device(report["device"], len(report["shapes"]))
    if len(report["shapes"]) > 1:
        out.print(
            f"shapes {'; '.join(map(text_of, report['shapes']))}; calibrated and measured at the first", highlight=False
        )
    if report["quality"]:
        out.print(
            f"prediction SQNR against the float model {_db(report['quality']['sqnr'])}{_branches(report['quality'])}"
        )
    out.print(
        f"source {source.get('class')} {source.get('file', '')} sha256 {str(source.get('sha256', 'unknown'))[:16]}, "
        f"{source['parameters']:,} parameters"
    )
    for text in report["warnings"] or ():
        out.print(f"note: {text}", highlight=False)
    sampler = report["sampler"]
    out.print(
        f"sampler {sampler['_class_name']}, {sampler['steps']} steps{_guidance(sampler)}; seed {report['config']['seed']}; made with {report['versions']}"
    )


def print_settings(report: dict[str, Any]) -> None:
    """Print every setting of the compilation, and what the file says it must be used with."""
    out = console()
    table = Table(title="settings", title_justify="left", show_header=False)
    for name, value in report["config"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, setting in parts:
            table.add_row(f"{name}.{part}" if part else name, "the method's" if setting is None else str(setting))
    out.print(table)
    for spec in report["inputs"]:
        out.print(f"input {spec['name']}: {spec['dtype']} {['B', *spec['shape']]}", highlight=False)


def print_summary(summary: dict[str, Any]) -> None:
    """Print what a compilation did."""
    out = console()
    table = Table(
        show_header=False,
        title=f"{summary['model'].get('file', summary['model']['class'])} → {summary['output']}",
        title_justify="left",
    )
    size, weights = summary["bytes"], summary["weights"]
    table.add_row("method", f"{summary['method']} {summary['config']}, {summary['blocks']} blocks reconstructed")
    table.add_row("layers", ", ".join(f"{count} {width}" for width, count in summary["layers"].items()))
    if len(summary["shapes"]) > 1:
        table.add_row("shapes", f"{'; '.join(map(text_of, summary['shapes']))}; calibrated and measured at the first")
    table.add_row(
        "average weight width",
        f"{summary['average_weight_bits']:.2f} bits ({_chosen(summary)})",
    )
    table.add_row(
        "weights of quantized layers",
        f"{human(weights['fp16_bytes'])} fp16 → {human(weights['bytes'])} ({weights['ratio_to_fp16']:.3f}x)",
    )
    table.add_row(
        "model",
        f"{human(size['fp32_parameters'])} fp32, {human(size['fp16_parameters'])} fp16 → {human(size['file'])} file",
    )
    if summary["sqnr_db"]:
        quality = summary["sqnr_db"]
        table.add_row(
            "noise SQNR against float",
            f"{_db(quality['sqnr'])} over all steps, worst step {_db(_worst(quality['per_step']))}{_branches(quality)}",
        )
    stages = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in summary["seconds"].items() if v >= 0.5)
    table.add_row("time", f"{summary['total_seconds']:.0f} s ({stages})")
    print_work(table, summary)
    out.print(table)
    print_mixed(out, summary["mixed_precision"], summary["sqnr_db"])
    print_device(summary.get("device"), len(summary["shapes"]))
    for name, reason in summary["float_layers"].items():
        out.print(f"float: {name}: {reason}", highlight=False)
    for note in summary["notes"]:
        out.print(f"note: {note}", highlight=False)


def print_work(table: Table, summary: dict[str, Any]) -> None:
    """Rows for what came from an earlier run, and for caches that were spilled."""
    resumed, caches = summary.get("resumed"), summary.get("caches")
    if resumed:
        kept = ", ".join(f"{k.replace('_', ' ')} {v:.0f}" for k, v in resumed["seconds"].items() if v >= 0.5)
        blocks = f"{resumed['blocks']} blocks, " if resumed["blocks"] else ""
        table.add_row(
            "from an earlier run", f"{blocks}{resumed['total_seconds']:.0f} s of work ({kept or 'short stages'})"
        )
    if caches and caches["limit"] is not None:
        table.add_row(
            "cached activations",
            f"at most {human(caches['memory_peak'])} in memory (limit {human(caches['limit'])}), "
            f"{human(caches['spilled_peak'])} in files",
        )


def _chosen(summary: dict[str, Any]) -> str:
    mixed = summary["mixed_precision"]
    if mixed is None:
        return f"{len(summary['promoted'])} layers promoted to 8"
    return f"{sum(r['widths'].startswith('w8') for r in mixed['layers'])} layers at 8, chosen by error"


def print_launches(rows: list[dict[str, Any]], title: str) -> None:
    """Print one launch plan."""
    out = console()
    table = Table(title=title, title_justify="left")
    for name in (
        "#",
        "layer",
        "kernel",
        "codes",
        "tile",
        "split",
        "warps",
        "regs",
        "smem",
        "writes",
        "when",
        "why in the library",
    ):
        table.add_column(
            name, overflow="fold", justify="left" if name in ("layer", "kernel", "why in the library") else "right"
        )
    for i, row in enumerate(rows):
        values = [row["layer"], row["kernel"], row["codes"], row["tile"], row["split_k"], row["warps"], row["registers"],
                  row["shared"], " ".join(row["writes"]), row["when"], row["why_float"]]  # fmt: skip
        style = "yellow" if row["why_float"] else ""
        table.add_row(str(i), *("" if v is None else str(v) for v in values), style=style)
    out.print(table)


def print_device(device: dict[str, Any] | None, shapes: int = 1) -> None:
    """Print what GPU code a file with so many shapes holds."""
    out = console()
    if device is None and shapes > 1:
        out.print("no GPU code (it is made for files of one shape)", highlight=False)
        return
    if device is None:
        out.print("no GPU code (add it with: edadm-compile target FILE --targets ...)", highlight=False)
        return
    table = Table(title=f"GPU code: {device['kernels']} kernels, {human(device['code_bytes'])}", title_justify="left")
    for name in ("GPU", "batch", "launches a step", "of them in the library", "once per prompt", "arena"):
        table.add_column(name, justify="right")
    for plan in device["plans"]:
        table.add_row(
            plan["arch"], str(plan["batch"]), str(plan["launches"] - plan["once_per_prompt"]),
            str(plan["library_launches"]), str(plan["once_per_prompt"]), human(plan["arena_bytes"]),
        )  # fmt: skip
    out.print(table)


def _sampler(program: Program) -> dict[str, Any]:
    """Scheduler settings, steps, and the guidance where there is some (without the tensors of its branch)."""
    sampler, names = program.sampler, [s.name for s in program.signature.conditions]
    null = [name for name, row in zip(names, sampler.null, strict=False) if row is not None]
    guidance = {"guidance": sampler.guidance, "null": null} if null else {}
    return {**sampler.scheduler, "steps": sampler.steps, **({"eta": sampler.eta} if sampler.eta else {}), **guidance}


def _guidance(sampler: dict[str, Any]) -> str:
    return f", guidance {sampler['guidance']:g} against {', '.join(sampler['null'])}" if "guidance" in sampler else ""


def _branches(quality: dict[str, Any]) -> str:
    """The figures of the two branches beside the guided one."""
    if "branches" not in quality:
        return ""
    without, with_condition = quality["branches"]
    return f" (guided; {_db(without)} without and {_db(with_condition)} with the condition)"


def _worst(steps: list[float | None]) -> float | None:
    """The lowest figure; None (exact) where every step is."""
    return min((v for v in steps if v is not None), default=None)


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
