"""Tables of the evaluate verb."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from edadm_compile.report.tables import console

#: Sampler steps shown besides the worst one; --json has all.
_SHOWN = 10
#: What the keys of ``left_out`` stand for.
_GROUPS = {
    "features": "Fréchet distance and KID",
    "data": "distances to real images",
    "lpips": "LPIPS",
    "inception": "FID and inception score (Inception features)",
}


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Print what `evaluate` measured."""
    out = console()
    out.print(
        f"{result['artifact']} on the {result['engine']} engine against {result['reference']}: {result['count']} images from the "
        f"same noise, {result['scheduler']}, {result['steps']} steps",
        highlight=False,
    )
    if not result["same_model"]:
        out.print("note: the reference file is not the one that was compiled (its checksum differs)", highlight=False)
    out.print(_steps(result["noise"]))
    out.print(_images(result))
    if result["distances"]:
        out.print(_distances(result))
    if "inception_score" in result["metrics"]:
        out.print(f"inception score {result['metrics']['inception_score']:.3f}", highlight=False)
    for key, reason in result["left_out"].items():
        out.print(f"left out: {_GROUPS[key]}: {reason}", highlight=False)
    for note in result["notes"]:
        out.print(f"note: {note}", highlight=False)
    if result["gates"]:
        out.print(_gates(result["gates"]))


def _steps(noise: Mapping[str, Any]) -> Table:
    """Predictions of both models on the same states."""
    steps, worst = noise["per_step"], noise["worst_step"]["step"]
    shown = {round(i * (len(steps) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)} | {worst}
    table = Table(title="noise prediction along float trajectories", title_justify="left")
    table.add_column("step")
    for name in ("timestep", "SQNR, dB"):
        table.add_column(name, justify="right")
    for row in (steps[i] for i in sorted(shown)):
        mark = " (worst)" if row["step"] == worst else ""
        table.add_row(f"{row['step'] + 1} of {len(steps)}{mark}", f"{row['timestep']:g}", _db(row["sqnr_db"]))
    table.add_section()
    table.add_row("without the last", "", _db(noise["sqnr_without_last_step_db"]))
    table.add_row("all", "", _db(noise["sqnr_db"]), style="bold")
    return table


def _images(result: Mapping[str, Any]) -> Table:
    """Final images of both models, pair by pair."""
    images = result["images"]
    table = Table(title="images, quantized against float", title_justify="left")
    table.add_column("measure")
    for name in ("mean", "median", "worst"):
        table.add_column(name, justify="right")
    table.add_row("PSNR, dB", *(f"{images['psnr_db'][k]:.2f}" for k in ("mean", "median", "worst")))
    window = images["ssim_window"]
    table.add_row(f"SSIM ({window}x{window})", *(f"{images['ssim'][k]:.4f}" for k in ("mean", "median", "worst")))
    if images["lpips"] is not None:
        table.add_row("LPIPS (AlexNet)", f"{images['lpips']:.4f}", "", "")
    return table


def _distances(result: Mapping[str, Any]) -> Table:
    table = Table(title="distances between sets of images (0 is equal)", title_justify="left")
    for name in ("sets", "features"):
        table.add_column(name)
    for name in ("dimension", "samples", "Fréchet", "KID"):
        table.add_column(name, justify="right")
    for row in result["distances"]:
        first, second = row["between"]
        table.add_row(
            f"{first} to {second}", row["features"], str(row["dimension"]), " and ".join(map(str, row["samples"])),
            f"{row['frechet']:.4f}", f"{row['kid']:.3g} ± {row['kid_standard_error']:.2g}",
        )  # fmt: skip
    return table


def _gates(gates: list[Mapping[str, Any]]) -> Table:
    table = Table(title="limits", title_justify="left")
    table.add_column("metric")
    for name in ("found", "asked", "outcome"):
        table.add_column(name, justify="right")
    for row in gates:
        found = "exact" if row["found"] is None else f"{row['found']:.6g}"
        sign = "at least" if row["fail"] == "below" else "at most"
        style = "" if row["passed"] else "red"
        outcome = "passed" if row["passed"] else "FAILED"
        table.add_row(row["metric"], found, f"{sign} {row['limit']:g}", outcome, style=style)
    return table


def _db(value: float | None) -> str:
    return "exact" if value is None else f"{value:.2f}"
