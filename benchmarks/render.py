"""Write the results sections of README.md and docs/families.md from the result files.

python benchmarks/render.py          rewrite the sections
python benchmarks/render.py --check  exit 1 when they do not match the files
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.families.tables import families_table, memory_table, reasons_list

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "benchmarks" / "results" / "cpu-2core" / "digits_quality.json"
CIFAR10 = ROOT / "benchmarks" / "results" / "cpu-2core" / "onnxruntime_cifar10.json"
FAMILIES = ROOT / "benchmarks" / "results" / "cpu-2core" / "families.json"
MEMORY = ROOT / "benchmarks" / "results" / "cpu-2core" / "memory.json"
METHODS = ROOT / "benchmarks" / "results" / "cpu-2core" / "methods.json"
ABLATIONS = ROOT / "benchmarks" / "results" / "cpu-2core" / "ablations.json"
CIFAR10_METHODS = ROOT / "benchmarks" / "results" / "cpu-2core" / "cifar10_methods.json"
KERNELS = ROOT / "benchmarks" / "results" / "h200" / "kernel_targets.json"
H100 = ROOT / "benchmarks" / "results" / "h100"
_WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4")
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


def methods_table(results: dict[str, Any]) -> str:
    """Published methods beside the default one as Markdown."""
    budget, cells = results["budget"], list(results["cells"].values())
    names = [
        n
        for n in (
            "min-max",
            "PTQ4DM",
            "TFMQ-DM",
            "TFMQ-DM (simulated)",
            "EDA-DM",
            "Q-Diffusion",
            "ours, strict",
            "ours",
        )
        if any(c["method"] == n for c in cells)
    ]
    seeds = len({cell["seed"] for cell in cells})
    lines = [
        f"Digits example, mean of {seeds} seeds, {budget['iters']} reconstruction steps per block and phase, {budget['samples']} calibration samples, {budget['n']} images",
        f"({', '.join(f'[{k}]({METHODS.with_suffix(s).relative_to(ROOT)})' for k, s in (('cells', '.json'), ('table', '.csv'), ('plot', '.png')))}, made by `benchmarks/quality/methods.py`).",
        "What each method is here: [docs/quantization.md](docs/quantization.md#10-methods). In each cell: noise SQNR in dB, and the Fréchet",
        "distance of its images to the float model's. \"Simulated\": a set of activation scales for each sampler step, computed in floats; the",
        "other rows are programs in integers.",
        "",
        "| | " + " | ".join(width.upper() for width in _WIDTHS) + " |",
        "|---" * (len(_WIDTHS) + 1) + "|",
    ]  # fmt: skip
    for name in names:
        row = []
        for width in _WIDTHS:
            found = [c for c in cells if (c["method"], c["width"]) == (name, width)]
            sqnr, distance = (sum(c[k] for c in found) / len(found) for k in ("sqnr_db", "frechet_to_float"))
            row.append(f"{sqnr:.1f}, {distance:.3f}")
        title = {"ours": "default", "ours, strict": "default, `--uniform`"}.get(name, name)
        lines.append(f"| {title} | {' | '.join(row)} |")
    return "\n".join(lines)


def cifar10_table(results: dict[str, Any]) -> str:
    """The same methods on a trained model of CIFAR-10 as Markdown."""
    budget, cells = results["budget"], list(results["cells"].values())
    lines = [
        f"The CIFAR-10 model of [examples/cifar10](examples/cifar10/README.md), W4A8, one seed, {budget['steps']} sampler steps, {budget['iters']} reconstruction steps per block and",
        f"phase, {budget['samples']} calibration samples, {budget['n']} images; distances in the feature space of a small classifier, not FID; to real images the float",
        f"model's is {results['float']['frechet_to_real']:.2f} ([cells]({CIFAR10_METHODS.relative_to(ROOT)}), made by `benchmarks/cifar10/table.py`).",
        "",
        "| | noise SQNR, dB | without the last step | image PSNR, median dB | Fréchet to float | Fréchet to real |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for cell in sorted(cells, key=lambda c: c["sqnr_db"]):
        title = {"ours": "default", "ours, strict": "default, `--uniform`"}.get(cell["method"], cell["method"])
        figures = [f"{cell[k]:.1f}" for k in ("sqnr_db", "sqnr_without_last_step_db", "psnr_median_db")]
        figures += [f"{cell[k]:.2f}" for k in ("frechet_to_float", "frechet_to_real")]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines)


_PARTS = {
    "neither": "uniform timesteps, block losses",
    "TDAC": "TDAC, block losses",
    "FBR": "uniform timesteps, block and layer losses (FBR)",
    "both": "TDAC, block and layer losses (the default)",
    "FBR, far": "uniform timesteps, layer losses train everything in front of them, as released",
    "both, far": "the same with TDAC",
    "density alone": "density alone, block losses",
    "diversity alone": "diversity alone, block losses",
    "layer losses alone": "default with layer losses alone",
    "QDrop": "default with QDrop 0.5",
    "regulariser": "default with AdaRound's regulariser",
    "no split": "default without split scales",
    "no mean correction": "default without mean correction",
}


def ablations_table(results: dict[str, Any]) -> str:
    """What the parts of the default method are worth as Markdown."""
    budget, cells = results["budget"], list(results["cells"].values())
    lines = [
        f"The default method with parts of it taken away or put in, W4A8, digits example, {budget['iters']} reconstruction steps, {budget['samples']} calibration samples;",
        "mean of three seeds and, in brackets, the largest less the smallest",
        f"([cells]({ABLATIONS.relative_to(ROOT)}), made by `benchmarks/quality/methods.py --ablations --widths w4a8`).",
        "",
        "| | noise SQNR, dB | without the last step | last step | image PSNR, median dB | Fréchet to float |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, title in _PARTS.items():
        found = [c for c in cells if c["method"] == name]
        if found:
            lines.append(f"| {title} | {' | '.join(_spread(found, k, d) for k, d in _PART_FIGURES)} |")
    return "\n".join(lines)


_PART_FIGURES = (
    ("sqnr_db", 2), ("sqnr_without_last_step_db", 2), ("worst_step_db", 2), ("psnr_median_db", 1), ("frechet_to_float", 4),
)  # fmt: skip


def _spread(cells: list[dict[str, Any]], figure: str, digits: int) -> str:
    """Mean and range of one figure."""
    values = [cell[figure] for cell in cells]
    return f"{sum(values) / len(values):.{digits}f} ({max(values) - min(values):.{digits}f})"


def kernels_table(results: dict[str, Any]) -> str:
    """Kernels on a GPU as Markdown."""
    machine, peak = results["machine"], results["ceilings"]["int8_operations_per_second"]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}; int8 peak, measured on operands that never leave the multiprocessor: {peak / 1e12:.0f} TOPS",
        f"([file]({KERNELS.relative_to(ROOT)}), [what it is](benchmarks/results/h200/README.md)). Best tile of each kernel; in each cell: TOPS, and times",
        "faster than cuBLAS or cuDNN in float16.",
        "",
        "| | W8A8 portable | W8A8 sm_90 | W4A8 portable | W4A8 sm_90 |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for shape in results["shapes"]:
        if shape["group"] == "norm":
            continue
        sizes = (
            f"{shape['rows']} x {shape['channels']} x {shape['outputs']}" if shape["group"] == "gemm"
            else f"3x3, {shape['channels']} to {shape['outputs']}, {shape['height']}², batch {shape['batch']}"
        )  # fmt: skip
        cells = []
        for name in ("portable w8", "sm_90 path w8", "portable w4", "sm_90 path w4"):
            cells.append(f"{shape[name]['operations_per_second'] / 1e12:.0f}, {shape[name]['speedup_over_fp16']:.2f}")
        lines.append(f"| {sizes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_table(folder: Path) -> str:
    """Whole UNets on a GPU as Markdown."""
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in (
        "cifar10_w8a8", "sd15_w8a8", "sd15_w8a8_compiled", "widths_cifar10", "widths_sd15"
    )}  # fmt: skip
    machine = read["cifar10_w8a8"]["machine"]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}; files compiled on a machine without a GPU, tiles of the cost model, random weights",
        f"([files]({folder.relative_to(ROOT)}/README.md)). Medians, interleaved; behind each time of the float model: how many times faster W8A8 is",
        "in the same round. W4A8 took turns with W8A8 in another run.",
        "",
        "| UNet, batch | W8A8, ms | W4A8, ms | CUDA graph fp16, ms | torch.compile `reduce-overhead` fp16, ms |",
        "|---|---|---|---|---|",
    ]
    for title, name in (("CIFAR-10", "cifar10"), ("Stable Diffusion 1.5", "sd15")):
        compiled = _times(read["sd15_w8a8_compiled"]) if name == "sd15" else {}
        narrow = {row["batch"]: row["w4"]["microseconds"]["median"] for row in read[f"widths_{name}"]["batches"]}
        for batch, rows in _times(read[f"{name}_w8a8"]).items():
            other = compiled.get(batch, {}).get("torch.compile reduce-overhead fp16")
            cells = [
                f"{rows['cuda'][0]:.2f}",
                f"{narrow[batch] / 1e3:.2f}",
                _beside(rows["CUDA graph fp16"]),
                _beside(other),
            ]
            lines.append(f"| {title}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> dict[int, dict[str, tuple[float, float]]]:
    """By batch and contender: milliseconds, and that over ours in the same round."""
    return {
        group["batch"]: {
            row["contender"]: (row["microseconds"]["median"] / 1e3, row["ratio"]["median"]) for row in group["rows"]
        }
        for group in result["batches"]
    }


def _beside(value: tuple[float, float] | None) -> str:
    return "" if value is None else f"{value[0]:.2f} ({value[1]:.2f})"


def rendered(text: str) -> str:
    """README.md with its sections from the files."""
    quality = json.loads(DIGITS.read_text())
    sections = {
        "results": f"{digits_table(quality)}\n\n{onnx_table(quality)}",
        "methods": methods_table(json.loads(METHODS.read_text())),
        "cifar10": cifar10_table(json.loads(CIFAR10_METHODS.read_text())),
        "ablations": ablations_table(json.loads(ABLATIONS.read_text())),
        "speed": speed_table(json.loads(CIFAR10.read_text())),
        "kernels": kernels_table(json.loads(KERNELS.read_text())),
        "models": models_table(H100),
    }
    return _with_sections(text, sections)


def rendered_families(text: str) -> str:
    """docs/families.md with its sections from the files."""
    families = json.loads(FAMILIES.read_text())
    sections = {
        "families": families_table(families),
        "reasons": reasons_list(families),
        "memory": memory_table(json.loads(MEMORY.read_text())),
    }
    return _with_sections(text, sections)


def _with_sections(text: str, sections: dict[str, str]) -> str:
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
    for name, render in {"README.md": rendered, "docs/families.md": rendered_families}.items():
        page = ROOT / name
        text = page.read_text()
        wanted = render(text)
        if check and wanted != text:
            sys.exit(f"{name}: a results section does not match benchmarks/results; run python benchmarks/render.py")
        if not check:
            page.write_text(wanted)


if __name__ == "__main__":
    main()
