"""Methods x widths x seeds on the digits model: one table, as JSON, CSV and a plot.

    python -m benchmarks.quality.methods --out benchmarks/results/NAME/methods

Every cell compiles the model with one method and measures the program with integer constants against the float model:
noise-prediction SQNR over whole float trajectories from fresh noise, median PSNR of images from the same noise, the share
of conditional samples that the example's classifier recognises, and Fréchet distances of its features (to real digits, and
to the float model's own samples). Budgets are the same for all methods and smaller than the command line's defaults; the
file says which. A cell that is in the file already is not computed again, so an interrupted run goes on where it was.

"TFMQ-DM (simulated)" adds what that method has no integer form for here, one set of activation scales per sampler step
(`benchmarks/quality/tfmq.py`); its cells are fake-quantized floats, those of all other rows programs with integer constants.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import tfmq
from benchmarks.quality.digits import Benchmark, machine
from edadm_compile.config import QuantConfig
from edadm_compile.driver.compile import make_config
from edadm_compile.evaluate.metrics import frechet
from edadm_compile.passes.base import Silent
from edadm_compile.pipeline import compile_source

#: name -> settings. "ours" is the default method; "ours, strict" has the widths papers count (``--uniform``).
METHODS: dict[str, dict[str, Any]] = {
    "min-max": {"method": "minmax"},
    "PTQ4DM": {"method": "ptq4dm"},
    "Q-Diffusion": {"method": "q-diffusion"},
    "TFMQ-DM": {"method": "tfmq-dm"},
    "TFMQ-DM (simulated)": {"method": "tfmq-dm", "simulated": True},
    "EDA-DM": {"method": "eda-dm"},
    "ours, strict": {"uniform": True},
    "ours": {},
}
#: What the parts of our method are worth: TDAC and the layer losses (FBR) alone and together, then one switch each.
#: With the widths of the default, or the strict ones (``--uniform``).
ABLATIONS: dict[str, dict[str, Any]] = {
    "neither": {"selection": "uniform", "loss": "block"},
    "TDAC": {"loss": "block"},
    "FBR": {"selection": "uniform"},
    "both": {},
    "FBR, far": {"selection": "uniform", "local_layer_losses": False},
    "both, far": {"local_layer_losses": False},
    "density alone": {"selection": "density", "loss": "block"},
    "diversity alone": {"selection": "diversity", "loss": "block"},
    "layer losses alone": {"loss": "layer"},
    "QDrop": {"qdrop": 0.5},
    "regulariser": {"rounding_weight": 0.01},
    "no split": {"split": False},
    "no mean correction": {"mean_correction": False},
}
#: Settings without an option on the command line.
_TRAINED = ("rounding_weight", "local_layer_losses")
_FILE_ONLY = ("mean_correction", "simulated", *_TRAINED)
WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a6", "w4a4")
FIGURES = (
    "sqnr_db", "sqnr_without_last_step_db", "worst_step_db", "psnr_median_db", "recognised_percent", "frechet_to_real",
    "frechet_to_float", "compile_seconds",
)  # fmt: skip
_bench: Any = None


def configuration(settings: dict[str, Any], width: str, seed: int, iters: int, samples: int) -> QuantConfig:
    """The settings of a cell."""
    on_the_command_line = {k: v for k, v in settings.items() if k not in _FILE_ONLY}
    options = {"preset": width, "seed": seed, "iters": iters, "calib_samples": samples, **on_the_command_line}
    config = make_config(options, None)
    if "mean_correction" in settings:
        config = replace(config, mean_correction=settings["mean_correction"])
    trained = {name: settings[name] for name in _TRAINED if name in settings}
    config = replace(config, reconstruction=replace(config.reconstruction, **trained))
    return config


def prepare(benchmark: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In each process: the model, the noise, the features, as `benchmark` makes them (`digits.Benchmark`, say)."""
    global _bench
    torch.set_num_threads(1)
    _bench = benchmark(*arguments)


def cell(settings: dict[str, Any], width: str, seed: int, iters: int, samples: int) -> dict[str, float]:
    """Compile and measure."""
    assert _bench is not None
    config = configuration(settings, width, seed, iters, samples)
    start = time.perf_counter()
    model: Any = (
        tfmq.simulate(_bench.source, config)
        if settings.get("simulated")
        else compile_source(_bench.source, config, Silent(), quality=False).qdq
    )
    seconds = time.perf_counter() - start
    found, images = _bench.measure(model)
    with torch.no_grad():
        distance = frechet(_bench.features(images), _bench.features(_bench.images))
    return {**found, "frechet_to_float": distance, "compile_seconds": seconds}


def run(
    todo: list[tuple[str, str, int]],
    table: dict[str, dict[str, Any]],
    args: Any,
    result: dict[str, Any],
    subject: tuple[Callable[..., Any], tuple[Any, ...]],
) -> None:
    """Compute the missing cells; the file is written after each."""
    context = get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=prepare, initargs=subject) as pool:
        waiting = {pool.submit(cell, table[m], w, s, args.iters, args.samples): (m, w, s) for m, w, s in todo}
        for number, future in enumerate(as_completed(waiting), 1):
            method, width, seed = waiting[future]
            result["cells"][f"{method} {width} {seed}"] = {
                "method": method, "width": width, "seed": seed, **future.result()
            }  # fmt: skip
            write(args.out, result)
            print(f"{number}/{len(todo)} {method} {width} seed {seed}: {future.result()['sqnr_db']:.2f} dB", flush=True)


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean and spread (largest minus smallest) over the seeds for each method and width."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["cells"].values():
        groups.setdefault((row["method"], row["width"]), []).append(row)
    rows = []
    for (method, width), found in sorted(groups.items(), key=lambda g: (WIDTHS.index(g[0][1]), g[0][0])):
        row: dict[str, Any] = {"width": width, "method": method, "seeds": len(found)}
        for name in (f for f in FIGURES if all(f in r for r in result["cells"].values())):
            values = [r[name] for r in found]
            row[name], row[f"{name}_spread"] = statistics.mean(values), max(values) - min(values)
        rows.append(row)
    return rows


def write(out: Path, result: dict[str, Any]) -> None:
    """``OUT.json`` and ``OUT.csv``."""
    out.with_suffix(".json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    rows = summary(result)
    with out.with_suffix(".csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def plot(out: Path, result: dict[str, Any]) -> None:
    """``OUT.png``: SQNR and Fréchet distance by width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summary(result)
    names = list(dict.fromkeys(row["method"] for row in rows))
    widths = [w for w in WIDTHS if any(row["width"] == w for row in rows)]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, name, label in zip(
        axes,
        ("sqnr_db", "frechet_to_float"),
        ("noise prediction, dB", "Fréchet distance to float samples"),
        strict=True,
    ):
        for number, method in enumerate(names):
            found = {row["width"]: row for row in rows if row["method"] == method}
            place = [i + (number - len(names) / 2) * 0.8 / len(names) for i, w in enumerate(widths) if w in found]
            values = [found[w][name] for w in widths if w in found]
            spread = [found[w][f"{name}_spread"] / 2 for w in widths if w in found]
            axis.bar(place, values, 0.8 / len(names), yerr=spread, label=method)
        axis.set_xticks(range(len(widths)), [w.upper() for w in widths])
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(names), fontsize=8)
    figure.savefig(out.with_suffix(".png"), dpi=150)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every table of methods."""
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--uniform", action="store_true", help="strict widths for every row")
    parser.add_argument("--widths", default=",".join(WIDTHS))
    parser.add_argument("--only", help="methods, comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=60, help="reconstruction steps per block and phase")
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("-n", type=int, default=200, help="conditional samples for images and Fréchet distances")
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")


def complete(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    table: dict[str, dict[str, Any]],
    subject: tuple[Callable[..., Any], tuple[Any, ...]],
    about: dict[str, Any],
    floating: dict[str, float],
) -> None:
    """Compute what is missing of a table, then write it and its plot.

    Args:
        subject: what `prepare` gets: it makes the object that cells are measured with.
        about: what else the figures depend on; kept with the budget.
        floating: figures of the float model.
    """
    if args.uniform:
        table = {name: {**settings, "uniform": True} for name, settings in table.items()}
        about = {**about, "uniform": True}
    names = args.only.split(";" if ";" in args.only else ",") if args.only else list(table)
    if unknown := [n for n in names if n not in table]:
        parser.error(f"unknown {', '.join(unknown)}; known are {', '.join(table)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    budget = {name: getattr(args, name) for name in ("iters", "samples", "n", "trajectories")} | about
    result: dict[str, Any] = {"machine": machine(), "budget": budget, "cells": {}}
    if args.out.with_suffix(".json").exists():
        before = json.loads(args.out.with_suffix(".json").read_text())
        if before["budget"] != budget:
            parser.error(f"{args.out}.json was made with {before['budget']}, not {budget}; choose another --out")
        result = before  # with the machine that most of it was measured on
    if floating:
        result["float"] = floating
    order = itertools.product(range(args.seeds), args.widths.split(","), names)
    todo = [(m, w, s) for s, w, m in order if f"{m} {w} {s}" not in result["cells"]]
    if todo:
        run(todo, table, args, result, subject)
    write(args.out, result)
    plot(args.out, result)


def main(argv: list[str] | None = None) -> None:
    """The table of the digits model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--ablations", action="store_true", help="what the parts of our method are worth instead")
    args = parser.parse_args(argv)
    table = ABLATIONS if args.ablations else METHODS
    complete(parser, args, table, (Benchmark, (args.n, args.trajectories)), {}, {})


if __name__ == "__main__":
    main()
