"""Add the mean error of each sampler step back to the prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edadm_compile.calibration.dataset import Trajectories
from edadm_compile.calibration.guidance import combine
from edadm_compile.ir.footprint import MOST_BYTES, rows_at_once
from edadm_compile.ir.program import Program, TimeTables
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.passes.checkpoint import Saved

aten = torch.ops.aten
_CHUNK = 64
#: Graph input that carries the correction.
INPUT = "time_correction"


@dataclass(frozen=True)
class MeanCorrection:
    """fake_quant graph to fake_quant graph.

    1. output → output + time_correction[:, :, None, None], a table of E[float - quantized] of the prediction per sampler
       step and channel, measured on the float model's calibration trajectories (other timesteps: interpolated)

    A small systematic error of the early steps is multiplied by up to 1 / sqrt(alpha_bar) on its way to the image.

    Under guidance the two branches have different mean errors m_u and m_c, but one table serves both: the program does
    not know which branch a row belongs to. The weights 1 - s and s of ``u + s (c - u)`` sum to one, so a correction r
    of both adds r to the guided prediction, whose mean error is ``m_u + s (m_c - m_u)``: that is r, and the guided
    prediction is free of mean error. At another scale s' an error ``(s' - s) (m_c - m_u)`` is left.
    """

    name: str = "mean_correction"
    reads: str = "fake_quant"
    writes: str = "fake_quant"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Measure, then add the table and its addition."""
        trajectories = ctx.calibration.trajectories
        keys, order = trajectories.t.double().unique(return_inverse=True)
        if not ctx.config.recipe.mean_correction or trajectories.prediction.dim() != 5:
            return PassResult(program, False)
        rows = torch.zeros(keys.numel(), trajectories.prediction.shape[2], dtype=torch.float64)
        apart = torch.zeros_like(rows)
        visits = torch.bincount(order, minlength=keys.numel())
        ctx.progress.stage("mean correction", trajectories.t.numel())
        model = program.at_most(rows_at_once(program, MOST_BYTES, _CHUNK))
        for step in ctx.world.turns(order.numel()):
            row = int(order[step])
            error = trajectories.prediction[step] - _predict(model, trajectories, step)
            used = combine(program.sampler, error, trajectories.x.shape[2])
            rows[row] += _mean(used) / visits[row]
            if program.sampler.guided:
                without, with_condition = error.chunk(2)
                apart[row] += (_mean(with_condition) - _mean(without)) / visits[row]
            ctx.progress.advance(ctx.world.size)
        ctx.world.add([rows, apart])
        program = add_table(program, keys, rows.float())
        stats = {"largest": float(rows.abs().max())}
        if program.sampler.guided:
            stats["branches_apart"] = float(apart.abs().max())
        return PassResult(program, True, stats)

    def state(self, program: Program) -> Saved:
        """The table; nothing where none was made."""
        time = program.time
        return Saved({"keys": time.keys, "rows": time.tables[INPUT]} if time and INPUT in time.tables else {})

    def restore(self, program: Program, saved: Saved) -> Program:
        """Add the table and its addition."""
        if not saved.tensors:
            return program
        return add_table(program, saved.tensors["keys"], saved.tensors["rows"])


def _mean(error: Tensor) -> Tensor:
    """float64 [C] of [B, C, H, W]."""
    return error.double().mean(dim=(0, 2, 3))


def _predict(program: Program, trajectories: Trajectories, step: int) -> Tensor:
    x = trajectories.x[step]
    t = trajectories.t[step].expand(x.shape[0])
    with torch.no_grad():
        return program(x, t, *trajectories.conditions)


def add_table(program: Program, keys: Tensor, rows: Tensor) -> Program:
    """Rule 1 with the table `rows` [S, C] at the timesteps `keys` [S]."""
    graph = program.graph_module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last):
        value = graph.placeholder(INPUT)
    value.meta = {"shape": (2, rows.shape[1]), "dtype": torch.float32, "batched": True}
    output = graph.output_node()
    with graph.inserting_before(output):
        column = graph.call_function(aten.reshape.default, (value, [-1, rows.shape[1], 1, 1]))
        total = graph.call_function(aten.add.Tensor, (output.args[0], column))
    output.args = (total,)
    return finish(replace(program, time=merge_table(program.time, keys, rows)))


def merge_table(time: TimeTables | None, keys: Tensor, rows: Tensor) -> TimeTables:
    """Add an interpolated table to the tables; a table that holds every timestep gets it filled in."""
    if time is None:
        return TimeTables(keys, {INPUT: rows})
    if time.keys.numel() != keys.numel() or not bool((time.keys == keys).all()):
        rows = TimeTables(keys, {INPUT: rows}).lookup(time.keys)[INPUT]
    return replace(time, tables={**time.tables, INPUT: rows})
