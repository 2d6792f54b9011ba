"""Write the results sections of README.md from the result files.

python benchmarks/render.py          rewrite the sections
python benchmarks/render.py --check  exit 1 when they do not match the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "benchmarks" / "results" / "cpu-2core" / "digits_quality.json"
CIFAR10 = ROOT / "benchmarks" / "results" / "cpu-2core" / "onnxruntime_cifar10.json"
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


def speed_table(results: dict[str, Any]) -> str:
    """The comparison beside ONNX Runtime as Markdown: the best run mode of each variant."""
    machine, settings = results["machine"], results["settings"]
    versions = machine["versions"]
    lines = [
        f"UNet2DModel with the configuration of google/ddpm-cifar10-32, {results['model']['parameters'] / 1e6:.1f} M parameters, random weights, one step; W8A8,",
        f"`--deploy onnxruntime --attention int8`. {machine['processor']}, {settings['cores']} cores ({', '.join(machine['instructions'])}), ONNX Runtime",
        f"{versions['onnxruntime']}, torch {versions['torch']}, commit {machine['commit']}; median of {settings['rounds']} rounds, interleaved in one process ([file]({CIFAR10.relative_to(ROOT)}),",
        "[how](benchmarks/onnxruntime/README.md)). Mode: one call with all threads, or one caller per core with one thread each; the",
        "faster one of each variant stands here. SQNR is that of the prediction against torch, on noise.",
    ]  # fmt: skip
    for group in results["batches"]:
        lines += [
            "",
            f"| {group['batch']} image{'s' if group['batch'] > 1 else ''} | mode | ms | times faster than ONNX Runtime fp32 | SQNR, dB |",
            "|---|---|---|---|---|",
        ]
        lines += [_speed_line(row) for row in group["rows"] if row["best_mode"]]
    return "\n".join(lines)


def _speed_line(row: dict[str, Any]) -> str:
    name = row["variant"].replace("ORT int8 ", "`quantize_static`, ").replace("ORT fp32", "ONNX Runtime fp32")
    quality = "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
    return f"| {name} | {row['mode']} | {row['milliseconds']['median']:.1f} | {row['times_faster']['median']:.2f} | {quality} |"


def rendered(text: str) -> str:
    """README.md with both sections from the files."""
    quality = json.loads(DIGITS.read_text())
    sections = {
        "results": f"{digits_table(quality)}\n\n{onnx_table(quality)}",
        "speed": speed_table(json.loads(CIFAR10.read_text())),
    }
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{section}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    """Rewrite or check the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = rendered(text)
    if check and wanted != text:
        sys.exit("README.md: a results section does not match benchmarks/results; run python benchmarks/render.py")
    if not check:
        readme.write_text(wanted)


if __name__ == "__main__":
    main()
