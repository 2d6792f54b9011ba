"""Measure and draw the pictures of docs/how_eda_dm_works.md on the digits example.

    python benchmarks/docs/pictures.py measure    compile three times, write benchmarks/results/cpu-2core/docs_pictures.json
    python benchmarks/docs/pictures.py draw       write docs/images/*.svg from that file
    python benchmarks/docs/pictures.py check      exit 1 when a picture was drawn from another file

The three compilations are W4A8 by default, without reconstruction, and round to nearest in strict widths. All have seed 0.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from edadm_compile.calibration.collect import collect
from edadm_compile.config import QuantConfig, ReconstructionConfig
from edadm_compile.frontend import load_source
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import weight_quantizers
from edadm_compile.pipeline import capture, compile_source, float_passes
from edadm_compile.quant.affine import per_channel

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2core" / "docs_pictures.json"
IMAGES = ROOT / "docs" / "images"
MODEL = ROOT / "examples" / "digits" / "model.pt"
#: Name in the legend -> settings.
CONFIGURATIONS = {
    "default": QuantConfig(),
    "without reconstruction": QuantConfig(reconstruction=ReconstructionConfig(iters=0)),
    "round to nearest, min-max": QuantConfig(method="minmax"),
}
#: Intervals of the fraction of w / s in the histogram of roundings.
_BINS = 20
# Readable on a light and on a dark page (Okabe and Ito's palette).
_COLOURS = ("#0072b2", "#d55e00", "#009e73")


def measure() -> dict[str, Any]:
    """Everything the pictures show, as plain values."""
    torch.manual_seed(0)
    found: dict[str, Any] = {"machine": machine(), "sqnr": {}}
    found |= calibration()
    for name, config in CONFIGURATIONS.items():
        print(f"compiling: {name}", flush=True)
        programs: dict[str, Program] = {}
        result = compile_source(load_source(MODEL), config, dump=programs.__setitem__)
        assert result.quality is not None
        found["sqnr"][name] = [round(value, 3) for value in result.quality.per_step]
        if name == "default":
            keys = ("unit", "layers", "before", "after")
            found["units"] = [{key: unit[key] for key in keys} for unit in result.stats["reconstruct"]["units"]]
            found["rounding"] = roundings(programs["reconstruct"])
    return found


def calibration() -> dict[str, Any]:
    """Scores and counts of TDAC, with the timesteps they belong to."""
    config = QuantConfig()
    source, ctx = load_source(MODEL), Context(config)
    program = run_passes(capture(source), float_passes(), ctx)
    samples = collect(program, config, ctx.generator(1), pool=source.conditions)
    chosen = samples.allocation
    scores = {name: [round(v, 5) for v in getattr(chosen, name).tolist()] for name in ("density", "diversity")}
    return {"timesteps": samples.trajectories.t.tolist(), "counts": chosen.counts.tolist(), **scores}


def roundings(program: Program) -> dict[str, Any]:
    """4-bit weights by the fraction of w / s: how many were rounded down and how many up."""
    down, up, moved, total = torch.zeros(_BINS), torch.zeros(_BINS), 0, 0
    for node, quantizer in weight_quantizers(program):
        info = layer_of(next(iter(node.users)))
        if info is None or info.weight_bits != 4:
            continue
        weight = get_constant(program.graph_module, str(node.args[0].target))
        exact = weight / per_channel(quantizer.scale, weight.dim(), quantizer.spec.axis)
        inside = (exact > quantizer.spec.qmin) & (exact < quantizer.spec.qmax)
        exact, codes = exact[inside], quantizer.integer_codes(weight).float()[inside]
        fraction, upward = exact - exact.floor(), codes > exact
        down += torch.histc(fraction[~upward], _BINS, 0, 1)
        up += torch.histc(fraction[upward], _BINS, 0, 1)
        moved += int((codes != exact.round()).sum())
        total += exact.numel()
    return {"down": down.int().tolist(), "up": up.int().tolist(), "moved": moved, "weights": total}


def machine() -> dict[str, Any]:
    """What the figures were made with."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": platform.machine(), "commit": commit}


def pictures(found: dict[str, Any]) -> dict[str, bytes]:
    """SVG files by name. Each carries the digest of `found`; equal input gives equal bytes with one version of matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "edadm-compile", "svg.fonttype": "path", "font.size": 9})
    return {f"{name}.svg": _svg(make, found) for name, make in _MAKERS.items()}


def digest(found: dict[str, Any]) -> str:
    """What a picture says it was drawn from."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def stale(found: dict[str, Any]) -> list[str]:
    """Pictures that are missing, or were drawn from other measurements."""
    paths = [IMAGES / f"{name}.svg" for name in _MAKERS]
    return [path.name for path in paths if not path.exists() or digest(found) not in path.read_text(encoding="utf-8")]


def _svg(make: Any, found: dict[str, Any]) -> bytes:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    make(axes, found)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(found)}, facecolor="white"
    )
    pyplot.close(figure)
    return buffer.getvalue()


def _tdac(axes: Any, found: dict[str, Any]) -> None:
    t = found["timesteps"]
    axes.plot(t, found["density"], color=_COLOURS[0], label="density")
    axes.plot(t, found["diversity"], color=_COLOURS[1], label="diversity")
    axes.set(xlabel="timestep (sampling goes from right to left)", ylabel="score", ylim=(0, 1.25))
    counts = axes.twinx()
    counts.bar(t, found["counts"], width=14, color=_COLOURS[2], alpha=0.35, label="samples")
    counts.set(ylabel="calibration samples", ylim=(0, 1.25 * max(found["counts"])))
    counts.spines["top"].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *counts.get_legend_handles_labels()[0]]
    axes.legend(handles, ["density", "diversity", "samples"], ncols=3, loc="upper center", frameon=False)


def _rounding(axes: Any, found: dict[str, Any]) -> None:
    centres = [(i + 0.5) / _BINS for i in range(_BINS)]
    down, up = found["rounding"]["down"], found["rounding"]["up"]
    axes.bar(centres, down, width=0.9 / _BINS, color=_COLOURS[0], label="rounded down")
    axes.bar(centres, up, width=0.9 / _BINS, bottom=down, color=_COLOURS[1], label="rounded up")
    axes.axvline(0.5, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="fraction of w / s (to the nearest: left of 0.5 down, right of it up)", ylabel="4-bit weights")
    axes.set_ylim(0, 1.25 * max(a + b for a, b in zip(down, up, strict=True)))
    axes.legend(ncols=2, loc="upper center", frameon=False)


def _blocks(axes: Any, found: dict[str, Any]) -> None:
    for key, colour in (("before", _COLOURS[1]), ("after", _COLOURS[0])):
        values = [unit[key] for unit in found["units"]]
        axes.plot(range(1, len(values) + 1), values, color=colour, marker="o", markersize=3, label=key)
    axes.set(
        xlabel="block, in execution order",
        ylabel="error / energy of the output",
        yscale="log",
        xlim=(0, len(found["units"]) + 1),
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(ncols=2, frameon=False)


def _sqnr(axes: Any, found: dict[str, Any]) -> None:
    for colour, (name, values) in zip(_COLOURS, found["sqnr"].items(), strict=True):
        axes.plot(found["timesteps"], values, color=colour, label=name)
    axes.set(xlabel="timestep (sampling goes from right to left)", ylabel="noise SQNR, dB")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)


_MAKERS = {"tdac": _tdac, "rounding": _rounding, "blocks": _blocks, "sqnr": _sqnr}


def main() -> int:
    """The verb's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("measure", "draw", "check"))
    verb = parser.parse_args().verb
    if verb == "measure":
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
        return 0
    found = json.loads(RESULTS.read_text())
    if verb == "draw":
        IMAGES.mkdir(parents=True, exist_ok=True)
        for name, content in pictures(found).items():
            (IMAGES / name).write_bytes(content)
    old = stale(found)
    if old:
        print(f"{', '.join(old)} in docs/images: run python benchmarks/docs/pictures.py draw")
    return int(bool(old))


if __name__ == "__main__":
    sys.exit(main())
