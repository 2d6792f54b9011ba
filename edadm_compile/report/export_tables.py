"""What ``export`` prints: what was written, what runs in integers, and how far from the reference engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from edadm_compile.report.tables import console, human


def print_export(result: dict[str, Any]) -> None:
    """Print what was written and what runs."""
    out = console()
    out.print(f"{result['output']}: {human(result['bytes'])} for {result['what']}")
    weights = result["weights"]
    kinds = " and ".join(f"{count} as {kind.upper()}" for kind, count in weights["layers"].items() if count)
    out.print(
        f"weights of quantized layers: {kinds or 'none'}; {human(weights['bytes'])}, {weights['ratio']:.3f} of float32"
    )
    if result["check"] is None:
        out.print("not checked in ONNX Runtime")
    else:
        _print_check(out, result["check"], result["target"])
    out.print(f"scales of convolution outputs: {result['output_scales']}")
    for note in result["notes"]:
        out.print(f"note: {note}")


def _print_check(out: Console, check: dict[str, Any], target: str) -> None:
    parts = [f"{c['integer']} of {c['integer'] + c['float']} {kind}" for kind, c in check["counts"].items()]
    out.print(f"run in integers by ONNX Runtime: {', '.join(parts)}")
    left = [r for r in check["layers"] if not r["integer"]]
    if target != "cpu":  # this machine has no kernels for the target's forms: only what is float anywhere is news
        elsewhere = [r for r in left if r["weights"] < 32]
        left = [r for r in left if r["weights"] == 32]
        if elsewhere:
            out.print(
                f"{len(elsewhere)} layers are written in integers for {target}; on this machine they run in float"
            )
    if left:
        table = Table("layer", "operators", "why", title="in float", title_justify="left")
        for row in left:
            table.add_row(row["layer"], ", ".join(row["operators"]), row["why"])
        out.print(table)
    codes, floats = _largest(check["layers"], "codes"), _largest(check["layers"], "float")
    ends = check["end_to_end"]
    if codes is not None or floats is not None:
        truth = "the program with symmetric codes" if target == "tensorrt" else "the reference engine"
        out.print(f"against {truth}, fed the same codes: {_differences(codes, floats)}")
    inputs = [r["input_error"] for r in check["layers"] if r["input_error"] is not None]
    if inputs:
        out.print(
            f"between layers: input codes of {len(inputs)} layers lie at most {max(inputs):.3f} steps from the values that they "
            "stand for (0.5 is rounding)"
        )
    db = ends["sqnr_to_reference_db"]
    out.print(f"end to end against the reference engine: {'equal' if db is None else f'{db:.1f} dB SQNR'}")
    if "sqnr_to_float_db" in ends:
        out.print(
            f"noise-prediction SQNR against the float model: {ends['sqnr_to_float_db']:.2f} dB, reference engine {ends['reference_engine_sqnr_to_float_db']:.2f} dB"
        )


def _differences(codes: float | None, floats: float | None) -> str:
    both = [] if codes is None else [f"output codes differ by at most {codes} step(s)"]
    if floats is not None:
        verb = "" if both else "differ "
        both.append(f"float outputs {verb}by at most {floats:.1e} of their largest value")
    return ", ".join(both)


def _largest(rows: Sequence[dict[str, Any]], output: str) -> float | None:
    """Largest error among the layers with one kind of output; None where there is none."""
    errors = [r["error"] for r in rows if r["output"] == output and r["error"] is not None]
    return max(errors) if errors else None
