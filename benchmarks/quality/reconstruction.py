"""Reconstruction steps per second: ours, and the paper's recipe in the same framework.

    python -m benchmarks.quality.reconstruction --out FILE.json

The recipe of arXiv 2401.04585's released code, per step: one quantized forward for the unit's output, one float forward for
the targets of its inner layers, one more quantized forward, with other QDrop masks, for the inner layers' outputs; a fresh
mask is drawn for every activation. Ours: one quantized forward for everything, float targets computed once, and, where
QDrop is on at all, masks cut from a pool. Units, batch, optimiser and thread count are the same, the two take turns unit by
unit, and the first steps of each are not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from benchmarks.quality.digits import EXAMPLE, machine
from edadm_compile.calibration.collect import collect
from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.frontend import load_source
from edadm_compile.ir.execute import run_nodes
from edadm_compile.ir.subgraph import Unit, find_units
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import Calibrate
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.reconstruct import UnitTrainer
from edadm_compile.passes.streams import Streams
from edadm_compile.pipeline import capture, float_passes

#: Steps of each contender before the clock starts.
WARM = 2


class FreshMasks:
    """QDrop masks drawn anew for every activation, as the released code does."""

    def __init__(self, probability: float) -> None:
        self._probability = probability

    def take(self, shape: torch.Size) -> Tensor:
        """A boolean mask of `shape`."""
        return torch.rand(shape) < self._probability


class ReleasedTrainer(UnitTrainer):
    """Three forwards per step; see the module."""

    def _set_drop(self, on: bool) -> None:
        self.pool: Any = FreshMasks(self.method.qdrop)
        for activation in self.activations:
            activation.drop = self.pool if on else None

    def loss(self, rows: Tensor, *, mix: bool = True) -> Tensor:
        """As `UnitTrainer.loss`, from three forwards."""
        inner = self.streams.float_rows(self.closure, self.watched, rows)
        first, second = self._forward(rows, mix), self._forward(rows, mix)
        out = self.unit.output
        total = self._error(out, first, {out: self._sampled(rows)[out]})
        for node in self.watched:
            total = total + self.method.layer_loss_weight * self._error(node, second, inner)
        return total

    def _forward(self, rows: Tensor, mix: bool) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {n: self._input(n, rows, mix) for n in self.inputs}
        run_nodes(self.program.graph_module, self.closure, values, (self.unit.output, *self.watched))
        return values


def speed(trainer: UnitTrainer, steps: int) -> float:
    """Seconds for `steps` steps."""
    optimizer = torch.optim.Adam(trainer._parameter_groups())
    trainer._set_drop(True)
    start = time.perf_counter()
    for step in range(WARM + steps):
        if step == WARM:
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        (trainer.loss(trainer._rows()) + trainer._regulariser(step)).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    trainer._finish()
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Measure every unit of the digits model and write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed steps for each unit and contender")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--units", type=int, help="only so many units")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    ours = QuantConfig(4, 8, calib_samples=args.samples, tdac=TdacConfig(trajectories=4))
    released = QuantConfig(4, 8, method="eda-dm", reconstruction=ReconstructionConfig())
    context = Context(ours)
    source = load_source(EXAMPLE / "model.pt")
    program = run_passes(capture(source), float_passes(), context)
    context.calibration = collect(program, ours, context.generator(0), pool=source.conditions)
    program = run_passes(program, [AssignWidths(), InsertQuant(), Calibrate()], context)
    units = find_units(program, ours.reconstruction.max_layers)
    streams = Streams(program, units, context.calibration.inputs)
    rows: list[dict[str, Any]] = []

    def measure(unit: Unit) -> None:
        if args.units is not None and len(rows) >= args.units:
            return
        seconds = {}
        for name, kind, config in (("released", ReleasedTrainer, released), ("ours", UnitTrainer, ours)):
            trainer = kind(program, unit, streams, config, "joint", context.generator(len(rows)))
            seconds[name] = speed(trainer, args.steps)
        rows.append({"unit": unit.name, "layers": len(unit.layers), **{f"{n}_seconds": s for n, s in seconds.items()}})
        print(rows[-1], flush=True)

    streams.advance(measure)
    total = {name: sum(row[f"{name}_seconds"] for row in rows) for name in ("released", "ours")}
    result = {
        "machine": machine(), "batch": ours.reconstruction.batch, "steps": args.steps, "units": rows,
        "steps_per_second": {name: len(rows) * args.steps / seconds for name, seconds in total.items()},
        "ratio": total["released"] / total["ours"],
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("steps per second", result["steps_per_second"], "ratio", round(result["ratio"], 2))


if __name__ == "__main__":
    main()
