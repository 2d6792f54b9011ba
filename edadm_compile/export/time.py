"""Time tables as ONNX nodes: rows of constants for the sampler's timesteps, the float path for all others."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from edadm_compile.export.builder import Builder
from edadm_compile.export.prepare import batch_sizes
from edadm_compile.export.scope import Dim, Emitter, Scope
from edadm_compile.ir.analysis import shapes_only
from edadm_compile.ir.program import Program, TimeTables


def table_rows(
    builder: Builder, program: Program, t: ir.Value, table: dict[str, Emitter], names: Sequence[str]
) -> list[ir.Value]:
    """Values of the graph inputs `names` (time tables) for timesteps `t` [B].

    Tables with every timestep are indexed by it. Otherwise one ``If`` decides: rows, when all timesteps are among the
    keys, else the folded float path and a linear interpolation of tables that the path does not compute. Either way
    the rows are one tensor [B, D], cut into the inputs.
    """
    time = program.time
    assert time is not None
    widths = [time.tables[name][0].numel() for name in names]
    joined = builder.constant(
        torch.cat([time.tables[name].reshape(time.keys.numel(), -1) for name in names], dim=1).float(), name="time_rows"
    )
    if time.path is None and time.path_outputs:
        index = builder.op("Cast", t, to=ir.DataType.INT64)
        rows = builder.op("Gather", joined, index, axis=0, name="time_row")
    else:
        rows = _known_or_not(builder, program, t, table, names, joined)
    parts = (
        builder.ops("Split", rows, builder.constant(widths), outputs=len(widths), axis=1, name="time")
        if len(widths) > 1
        else (rows,)
    )
    batch = Dim(0, 1)
    scope = Scope(program.graph_module, builder, table, ({}, {}), (1, 2))
    return [
        scope.reshape(part, [batch, *(Dim(v) for v in time.tables[name].shape[1:])], [batch], name=name)
        for part, name in zip(parts, names, strict=True)
    ]


def _known_or_not(
    builder: Builder, program: Program, t: ir.Value, table: dict[str, Emitter], names: Sequence[str], joined: ir.Value
) -> ir.Value:
    time = program.time
    assert time is not None
    keys = builder.constant(time.keys.float()[None], name="time_keys")  # [1, S]
    column = builder.op("Unsqueeze", builder.op("Cast", t, to=ir.DataType.FLOAT), builder.constant([1]))
    hits = builder.op("Cast", builder.op("Equal", column, keys), to=ir.DataType.FLOAT)  # [B, S]
    most = builder.op("ReduceMax", hits, builder.constant([1]), keepdims=0)
    known = builder.op("Cast", builder.op("ReduceMin", most, keepdims=0), to=ir.DataType.BOOL, name="timesteps_known")

    looked_up = Builder(builder)
    row = looked_up.op("Gather", joined, looked_up.op("ArgMax", hits, axis=1, keepdims=0), axis=0)
    computed = Builder(builder)
    other = _computed(computed, program, t, column, table, names)
    return builder.op(
        "If", known, then_branch=_graph(looked_up, row, "timesteps_in_table"),
        else_branch=_graph(computed, other, "other_timesteps"), name="time_row",
    )  # fmt: skip


def _graph(builder: Builder, output: ir.Value, name: str) -> ir.Graph:
    return ir.Graph((), [output], nodes=builder.nodes, name=name)


def _computed(
    builder: Builder, program: Program, t: ir.Value, column: ir.Value, table: dict[str, Emitter], names: Sequence[str]
) -> ir.Value:
    """Rows [B, D] for any timesteps."""
    time = program.time
    assert time is not None
    values = (
        {} if time.path is None else dict(zip(time.path_outputs, _run_path(builder, program, t, table), strict=True))
    )
    weights = None
    parts = []
    for name in names:
        if name in values:
            parts.append(builder.op("Flatten", values[name], axis=1))
            continue
        weights = _hat_weights(builder, time, column) if weights is None else weights
        rows = builder.constant(time.tables[name].reshape(time.keys.numel(), -1).float(), name=f"{name}_rows")
        parts.append(builder.op("MatMul", weights, rows))
    return parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=1)


def _hat_weights(builder: Builder, time: TimeTables, column: ir.Value) -> ir.Value:
    """[B, S] weights of a linear interpolation, constant beyond both ends.

    ``w_i = clamp((t - k_{i-1}) / (k_i - k_{i-1}), 0, 1) - clamp((t - k_i) / (k_{i+1} - k_i), 0, 1)``, with 1 and 0 at the ends.
    """
    keys = time.keys.float()
    ones = builder.op("Add", builder.op("Mul", column, builder.constant(0.0)), builder.constant(1.0))  # [B, 1]
    if keys.numel() == 1:
        return ones
    left = builder.constant(keys[:-1][None])
    gaps = builder.constant((keys[1:] - keys[:-1])[None])
    ramp = builder.op(
        "Clip", builder.op("Div", builder.op("Sub", column, left), gaps), builder.constant(0.0), builder.constant(1.0)
    )
    zeros = builder.op("Mul", column, builder.constant(0.0))
    up = builder.op("Concat", ones, ramp, axis=1)
    down = builder.op("Concat", ramp, zeros, axis=1)
    return builder.op("Sub", up, down)


def _run_path(builder: Builder, program: Program, t: ir.Value, table: dict[str, Emitter]) -> list[ir.Value]:
    assert program.time is not None and program.time.path is not None
    path = program.time.path
    dtype = program.signature.inputs[1].dtype
    sizes = batch_sizes(program.signature)
    runs = []
    for size in sizes:
        with shapes_only():
            recorder = torch.fx.Interpreter(path, garbage_collect_values=False)
            recorder.run(torch.empty(size, dtype=dtype))
            runs.append(dict(recorder.env))
    scope = Scope(path, builder, table, (runs[0], runs[1]), sizes)
    scope.batch = builder.op("Shape", t)
    return scope.run([t])
