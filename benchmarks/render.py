"""Write the results section of README.md from the result files.

python benchmarks/render.py          rewrite the section
python benchmarks/render.py --check  exit 1 when it does not match the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "benchmarks" / "results" / "cpu-2core" / "digits_quality.json"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_TITLES = {
    "float": "float model",
    "w8a8": "W8A8, default",
    "w8a8-minmax": "W8A8, round to nearest, min-max",
    "w4a8": "W4A8, default",
    "w4a8-uniform": "W4A8, `--uniform`",
    "w4a8-minmax": "W4A8, round to nearest, min-max",
}


def digits_table(results: dict[str, Any]) -> str:
    """The digits comparison as Markdown."""
    machine = results["machine"]
    lines = [
        f"Digits example, compile seed {results['seed']}, {results['trajectories']} fresh trajectories for SQNR, {results['n']} conditional samples",
        f"from one set of noise for the rest; {machine['threads']} thread(s), torch {machine['torch']}, commit {machine['commit']}",
        f"([file]({DIGITS.relative_to(ROOT)}), made by `benchmarks/quality/digits.py`).",
        "",
        "| | noise SQNR, dB | worst step, dB | image PSNR, median dB | recognised, % | Fréchet to real | weight bits | of fp16 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in _TITLES.items():
        row = results["rows"].get(name)
        if row is not None:
            lines.append(_line(title, row))
    return "\n".join(lines)


def onnx_table(results: dict[str, Any]) -> str:
    """The same files in ONNX Runtime as Markdown."""
    lines = [
        "The same files in ONNX Runtime; `--deploy` is `--deploy onnxruntime`. Integer layers: convolutions and linear layers.",
        "Same digit: share of images that the classifier reads as it reads the reference engine's from the same noise.",
        "",
        "| | noise SQNR, dB | reference engine, dB | image PSNR, median dB | recognised, % | same digit, % | integer layers | weights of fp32, INT8 | INT4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, title in {**_TITLES, "w8a8-deploy": "W8A8, `--deploy`", "w4a8-deploy": "W4A8, `--deploy`"}.items():
        row = results["rows"].get(name, {})
        if "onnxruntime" in row:
            lines.append(_onnx_line(title, row["sqnr_db"], row["onnxruntime"]))
    return "\n".join(lines)


def _onnx_line(title: str, reference: float, row: dict[str, Any]) -> str:
    exported = row["export"]
    counts = [exported["layers"][kind] for kind in ("conv2d", "linear")]
    integer, total = sum(c["integer"] for c in counts), sum(c["integer"] + c["float"] for c in counts)
    sizes = " | ".join(f"{exported['weights_ratio_to_fp32'][kind]:.3f}" for kind in ("int8", "int4"))
    same = f"{row['same_digit_as_reference_engine_percent']:.1f}"
    quality = f"{row['sqnr_db']:.1f} | {reference:.1f} | {row['psnr_median_db']:.1f} | {row['recognised_percent']:.1f}"
    return f"| {title} | {quality} | {same} | {integer} of {total} | {sizes} |"


def _line(title: str, row: dict[str, Any]) -> str:
    quality = f"{row['recognised_percent']:.1f} | {row['frechet_to_real']:.3f}"
    if "sqnr_db" not in row:
        return f"| {title} | | | | {quality} | 32 | |"
    error = f"{row['sqnr_db']:.1f} | {row['worst_step_db']:.1f} | {row['psnr_median_db']:.1f}"
    return f"| {title} | {error} | {quality} | {row['average_weight_bits']:.2f} | {row['weights_ratio_to_fp16']:.3f} |"


def main() -> None:
    """Rewrite or check the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    results = json.loads(DIGITS.read_text())
    wanted = f"{head}{BEGIN}\n{digits_table(results)}\n\n{onnx_table(results)}\n{END}{tail}"
    if check and wanted != text:
        sys.exit("README.md: the results section does not match benchmarks/results; run python benchmarks/render.py")
    if not check:
        readme.write_text(wanted)


if __name__ == "__main__":
    main()
