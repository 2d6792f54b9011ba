"""From a lowered program to a launch plan: simplify, group, order, place in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edadm_compile.errors import TargetError
from edadm_compile.ir.program import Program, placeholders
from edadm_compile.kernels.launch import TIME_TABLES, ConstantSpec, Launch, LaunchPlan, Operand
from edadm_compile.lowering import arena, leave_float, statistics
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.layout import contiguous
from edadm_compile.lowering.planner import Planner
from edadm_compile.lowering.simplify import specialise


@dataclass(frozen=True)
class FixedBatch:
    """A program simplified for one batch size: what all plans of that batch begin with, whatever their tiles are.

    Attributes:
        program: a private copy, not changed by making plans.
        batch: rows.
        float_layers: names of integer layers that it computes in float.
        derived: how the device makes the constants of these.
    """

    program: Program
    batch: int
    float_layers: tuple[str, ...]
    derived: dict[str, ConstantSpec]


def fix_batch(program: Program, batch: int, float_layers: Sequence[str] = ()) -> FixedBatch:
    """Most of the work of a plan; several plans may share it.

    Args:
        program: dialect lowered.

    Raises:
        TargetError: the program does not accept this batch.
    """
    signature = program.signature
    if not signature.min_batch <= batch <= signature.max_batch:
        raise TargetError(f"--batch {batch}: the captured model accepts {signature.min_batch} to {signature.max_batch}")
    module = program.fork()
    derived = leave_float.apply(module, float_layers)
    return FixedBatch(specialise(module, batch), batch, tuple(float_layers), derived)


def make_plan(program: Program, target: Target, fixed: FixedBatch | None = None) -> LaunchPlan:
    """The launches of one step.

    Args:
        program: dialect lowered.
        target: architecture, batch and element types.
        fixed: of the same program for the target's batch and float layers; made here by default.

    Raises:
        TargetError: the program does not accept this batch.
    """
    fixed = fixed or fix_batch(program, target.batch, target.float_layers)
    if (fixed.batch, fixed.float_layers) != (target.batch, tuple(target.float_layers)):
        raise ValueError(f"a program fixed for {fixed.batch} rows cannot become a plan for {target.batch}")
    module, signature = fixed.program, program.signature
    graph_inputs, tables = input_operands(program, target.batch)
    final = module.graph_module.graph.output_node().args[0].meta["val"]  # type: ignore[union-attr]
    shape = tuple(final.shape)
    result = Operand("output", 0, torch.float32, shape, contiguous(shape))
    build = Planner(module, target, graph_inputs, result, fixed.derived).run()
    statistics.attach(build)
    launches, conditioning = hoist(build.launches, [s.name for s in signature.conditions])
    buffers, size = arena.plan(arena.lifetimes(launches, build.sizes, build.names, conditioning))
    inputs = {s.name: ((target.batch, *s.shape), s.dtype) for s in signature.inputs}
    if tables:
        inputs[TIME_TABLES] = ((target.batch, sum(math.prod(s) for _, s in tables.values())), torch.float32)
    return LaunchPlan(
        target.arch, target.batch, target.store, tuple(launches), buffers, size, build.constants, build.counters,
        inputs, shape, conditioning, tables,
    )  # fmt: skip


def input_operands(program: Program, batch: int) -> tuple[dict[str, Operand], dict[str, tuple[int, tuple[int, ...]]]]:
    """Graph inputs in memory; all time tables are columns of one input, so that a step copies one row per image."""
    operands: dict[str, Operand] = {}
    for s in program.signature.inputs:
        shape = (batch, *s.shape)
        operands[s.name] = Operand("input", s.name, s.dtype, shape, contiguous(shape))
    tables: dict[str, tuple[int, tuple[int, ...]]] = {}
    if program.time is None:
        return operands, tables
    column = 0
    for name in placeholders(program.graph_module.graph):
        if name in program.time.tables and name not in operands:
            shape = tuple(program.time.tables[name].shape[1:])
            tables[name] = (column, shape)
            column += math.prod(shape)
    for name, (start, shape) in tables.items():
        operands[name] = Operand(
            "input", TIME_TABLES, torch.float32, (batch, *shape), (column, *contiguous(shape)), start
        )
    return operands, tables


def hoist(launches: Sequence[Launch], conditions: Sequence[str]) -> tuple[list[Launch], int]:
    """Move launches that depend on the conditions alone to the front; they run once per prompt."""
    known: set[int] = set()
    front, rest = [], []
    for launch in launches:
        reads = [o for role, o in launch.operands.items() if role not in launch.writes]
        constant = all(
            o.space == "constant" or (o.space == "input" and o.key in conditions)
            or (o.space == "arena" and o.key in known)
            for o in reads
        )  # fmt: skip
        writes_output = any(o.space == "output" for o in launch.operands.values())
        if constant and not writes_output:
            front.append(launch)
            known |= {int(o.key) for o in launch.operands.values() if o.space == "arena"}
        else:
            rest.append(launch)
    return front + rest, len(front)
