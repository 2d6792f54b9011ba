"""Fold everything that depends on the timestep alone into tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from edadm_compile.calibration.sampler import schedule_length, timesteps
from edadm_compile.ir.analysis import constant_target, dependencies, is_batched, is_layer, propagate_shapes
from edadm_compile.ir.ops import MOVEMENT_OPS, op_name
from edadm_compile.ir.program import Program, TimeTables, get_constant
from edadm_compile.ir.valueless import has_values
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.passes.insert_quant import layer_name


@dataclass(frozen=True)
class FoldTimePath:
    """Float graph to float graph with table inputs; a method that quantizes the time path leaves it as it is.

    1. a value computed from t and constants only, read by a node that needs more → an input ``time_k`` [B, ...] whose
       rows are looked up in a table with one row per sampler step

    The rest of the old path becomes a separate graph for timesteps outside the tables, unless tables for all
    timesteps of the schedule are smaller than its weights: then those are stored and the path is dropped.
    """

    name: str = "time_tables"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Fold the time path, if there is one."""
        graph = program.graph_module.graph
        frontier = _frontier(program) if ctx.config.recipe.time_tables else []
        if not frontier:
            return PassResult(program, False, {"tables": 0})
        path = _path_module(program, frontier)
        folded = _folded_layers(program, frontier)
        names = tuple(f"time_{i}" for i in range(len(frontier)))
        time = _choose_tables(program, path, names, folded)
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        for name, node in zip(reversed(names), reversed(frontier), strict=True):
            with graph.inserting_after(last):
                value = graph.placeholder(name)
            value.meta = dict(node.meta)
            node.replace_all_uses_with(value)
        program = finish(replace(program, time=time))
        propagate_shapes(program)
        stats = {
            "tables": len(names),
            "folded_layers": len(folded),
            "rows": time.keys.numel(),
            "path": time.path is not None,
        }
        return PassResult(program, True, stats)


def _frontier(program: Program) -> list[fx.Node]:
    """Maximal t-only float values with the batch in front that something beyond the time path reads."""
    graph = program.graph_module.graph
    deps = dependencies(graph)
    t = program.signature.inputs[1].name
    inside = {n for n in graph.nodes if t in deps[n] and deps[n] <= {t, "<batch>"}}
    frontier = [
        n for n in graph.nodes if n in inside and n.op != "placeholder" and any(u not in inside for u in n.users)
    ]
    if not all(is_batched(n) and n.meta["dtype"].is_floating_point for n in frontier):
        return []  # a value without a batch dimension cannot be a row per sample: keep the path as it is
    return [n for n in frontier if _worth_folding(n)]


def _worth_folding(node: fx.Node) -> bool:
    """Whether anything is computed on the way from t (a mere reshape or cast of t stays in the graph)."""
    while node.op == "call_function":
        name = op_name(node.target)
        if name not in MOVEMENT_OPS and not name.startswith(("aten.to", "aten._to_copy")):
            return True
        node = node.all_input_nodes[0]
    return False


def _path_module(program: Program, frontier: list[fx.Node]) -> fx.GraphModule:
    """The graph from t to the frontier values; shares constants with the program."""
    source = program.graph_module
    needed: set[fx.Node] = set()
    stack = list(frontier)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    t_name = program.signature.inputs[1].name
    mapping_t = graph.placeholder(t_name)
    for node in source.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            mapping[node] = mapping_t  # x can only be here for its batch size, which t has too
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in frontier))
    return fx.GraphModule(source, graph)


def _folded_layers(program: Program, frontier: list[fx.Node]) -> tuple[str, ...]:
    seen: set[fx.Node] = set()
    stack = list(frontier)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return tuple(layer_name(n) for n in program.graph_module.graph.nodes if n in seen and is_layer(n))


def _choose_tables(
    program: Program, path: fx.GraphModule, names: tuple[str, ...], folded: tuple[str, ...]
) -> TimeTables:
    """Tables of the sampler's steps beside the path, or of all timesteps without it: whichever is smaller."""
    spec = program.signature.inputs[1]
    keys = torch.as_tensor(timesteps(program.sampler), dtype=torch.float64).unique()
    rows = evaluate_path(path, keys, spec.dtype, program.signature.min_batch)
    row_bytes = sum(r[0].numel() * 4 for r in rows)
    length = schedule_length(program.sampler)
    targets = {t for n in path.graph.nodes if (t := constant_target(n))}
    path_bytes = sum(get_constant(path, t).numel() * 4 for t in targets)
    whole = spec.dtype in (torch.int32, torch.int64) and row_bytes * length <= path_bytes + row_bytes * keys.numel()
    if whole:
        keys = torch.arange(length, dtype=torch.float64)
        rows = evaluate_path(path, keys, spec.dtype, program.signature.min_batch)
    tables = dict(zip(names, rows, strict=True))
    return TimeTables(keys, tables, None if whole else path, names, folded)


def evaluate_path(path: fx.GraphModule, keys: Tensor, dtype: torch.dtype, batch: int) -> list[Tensor]:
    """Table rows: the path at each key, in batches of the size the graph was captured with (1 when free)."""
    columns: list[list[Tensor]] = []
    with torch.no_grad():
        for key in keys:
            if columns and not all(map(has_values, columns[0])):  # shapes alone: every row is like the first
                columns.append(columns[0])
                continue
            outputs = path(torch.full((batch,), float(key)).to(dtype))
            columns.append([value[0].float() for value in outputs])
    return [torch.stack(rows) for rows in zip(*columns, strict=True)]
