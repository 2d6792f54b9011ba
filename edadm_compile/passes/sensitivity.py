"""How much rounding in one place hurts the output, measured one layer at a time."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.calibration.dataset import Trajectories
from edadm_compile.ir.analysis import last_read, layer_weight, weight_node
from edadm_compile.ir.execute import evaluate
from edadm_compile.ir.footprint import kept_by, rows_within
from edadm_compile.ir.program import Program, Signature
from edadm_compile.passes.base import Context
from edadm_compile.passes.insert_quant import layer_name, weight_axis
from edadm_compile.quant.affine import per_channel, weight_codes
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import weight_spec

#: Above this many parameters one forward per layer is too slow; cheaper rules decide instead.
MEASURE_LIMIT = 100_000_000
#: Sampler states and trajectories of the measurement batch.
_STATES, _TRAJECTORIES = 8, 6
#: Clip candidates of the range search here; coarser than the real one, the error hardly changes.
_CANDIDATES = 40
#: Bytes of values that the measurement keeps at a time.
MOST_BYTES = 4 << 30


def sensitivities(
    program: Program, nodes: Sequence[fx.Node], bits: int, ctx: Context
) -> tuple[dict[fx.Node, float], float]:
    """Squared output error when one layer's weight is rounded to `bits` and all else is float.

    Measured on a few float trajectories at evenly spread sampler steps plus the last two, where the error is
    largest; only nodes downstream of the layer are recomputed.

    Returns:
        (error by layer node, squared output of the float model on the same inputs).
    """
    pieces = measurement_pieces(program, ctx)
    ctx.progress.stage("sensitivity", len(nodes) * len(pieces))
    scales = {i: _scale(program, nodes[i], bits) for i in ctx.world.turns(len(nodes))}
    errors, signal = torch.zeros(len(nodes), dtype=torch.float64), 0.0
    for piece in pieces:
        values = values_of(program, piece)
        for i, scale in scales.items():
            errors[i] += output_error(program, _rounded_weight(program, nodes[i], bits, scale), values)
            ctx.progress.advance(ctx.world.size, layer_name(nodes[i]))
        signal += output_energy(program, values)
        del values  # before those of the next piece are computed
    ctx.world.add([errors])
    return dict(zip(nodes, errors.tolist(), strict=True)), signal


def measurement_pieces(program: Program, ctx: Context) -> list[tuple[Tensor, ...]]:
    """The measurement batch, cut where the values of a forward would exceed `MOST_BYTES`, as many changed ones beside them."""
    inputs = measurement_inputs(ctx.calibration.trajectories, program.signature, program.sampler.branches)
    rows = rows_together(program, len(inputs[0]))
    return list(zip(*(v.split(rows) for v in inputs), strict=True))


def rows_together(program: Program, rows: int) -> int:
    """Rows of a piece of a measurement batch of `rows`."""
    if program.signature.min_batch > 1:  # the last piece could be too small for the graph
        return rows
    return rows_within(MOST_BYTES, 2 * kept_by(program.graph_module.graph.nodes), rows)


def values_of(program: Program, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Value of every node of a program on `inputs`, the model's, as a batch that the graph accepts."""
    arguments = iter(program.graph_inputs(list(inputs)))
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph_module.graph.nodes:
            values[node] = next(arguments) if node.op == "placeholder" else evaluate(program.graph_module, node, values)
    return values


def output_energy(program: Program, values: dict[fx.Node, Any], weights: Tensor | None = None) -> float:
    """Squared output of the float model, summed over the rows of the batch, with `weights` [rows] where given."""
    return _energy(values[program.graph_module.graph.output_node()], weights)


#: What a node reads, by node, before -> after rounding.
Rounding = Callable[[dict[fx.Node, Any]], dict[fx.Node, Any]]


def output_error(
    program: Program,
    changed: dict[fx.Node, Any],
    values: dict[fx.Node, Any],
    roundings: Mapping[fx.Node, Rounding] = types.MappingProxyType({}),
    weights: Tensor | None = None,
) -> float:
    """Squared error of the output when some values are others; only what depends on them is recomputed.

    Args:
        changed: new values by node; those of the nodes behind come and go in it, each until its last reader has run.
        values: from `values_of`.
        roundings: nodes that see other operands than the rest of the graph.
        weights: float64 [rows], of the rows of the batch in the sum; 1 each where not given.
    """
    done = last_read(program.graph_module.graph.nodes)
    with torch.no_grad():
        for node in program.graph_module.graph.nodes:
            rounding = roundings.get(node)
            if node in changed or (rounding is None and not any(n in changed for n in node.all_input_nodes)):
                continue
            read = {n: changed.get(n, values[n]) for n in node.all_input_nodes}
            changed[node] = evaluate(program.graph_module, node, read if rounding is None else rounding(read))
            for source in done.get(node, ()):
                changed.pop(source, None)
    output = program.graph_module.graph.output_node()
    return _energy(changed[output] - values[output], weights)


def _energy(value: Tensor, weights: Tensor | None) -> float:
    squares = value.double().square()
    if weights is None:
        return float(squares.sum())
    return float((squares.flatten(1).sum(1) * weights).sum())


def measurement_inputs(trajectories: Trajectories, signature: Signature, branches: int = 1) -> list[Tensor]:
    """A few states of the float trajectories as one batch of model inputs that the graph accepts.

    Args:
        branches: `SamplerSpec.branches`; rows of the trajectories are those of the doubled batch, both halves are measured.
    """
    chosen, picked, rows = _measured(trajectories, signature, branches)
    x = trajectories.x[chosen][:, picked].flatten(0, 1)
    t = trajectories.t[chosen].repeat_interleave(picked.numel())
    conditions = [c[picked].repeat(chosen.numel(), *[1] * (c.dim() - 1)) for c in trajectories.conditions]
    return [value[rows] for value in (x, t, *conditions)]


def measurement_weights(trajectories: Trajectories, signature: Signature, branches: int = 1) -> Tensor:
    """Sampler steps that each row of `measurement_inputs` stands for, float64 [rows].

    Sums over the rows with these weights estimate sums over all steps: what lies between two measured steps is
    interpolated linearly (trapezoidal rule). Without them the last steps, measured more densely, would count too much.
    """
    chosen, picked, rows = _measured(trajectories, signature, branches)
    knots = chosen.double()
    gaps = knots.diff()
    weights = torch.ones_like(knots)
    weights[:-1] += (gaps - 1) / 2  # the steps strictly inside a gap are shared by its two ends
    weights[1:] += (gaps - 1) / 2
    return weights.repeat_interleave(picked.numel())[rows]


def measured_rows(steps: int, scored: int, branches: int) -> int:
    """Rows of the measurement batch for so many sampler steps and rows of the scoring batch."""
    return min(steps, _STATES + 1) * branches * min(-(-_TRAJECTORIES // branches), scored // branches)


def _measured(trajectories: Trajectories, signature: Signature, branches: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sampler steps to measure, rows of the trajectories, and which of their states become rows, in order."""
    steps = trajectories.t.numel()
    spread = torch.linspace(0, steps - 1, min(_STATES - 1, steps)).round().long()
    chosen = torch.cat((spread, torch.tensor([max(steps - 2, 0), steps - 1]))).unique()
    each = trajectories.x.shape[1] // branches
    first = torch.arange(min(-(-_TRAJECTORIES // branches), each))
    picked = torch.cat([first + each * branch for branch in range(branches)])
    states = chosen.numel() * picked.numel()
    size = min(max(states, signature.min_batch), signature.max_batch)
    # From the last step backwards: it matters most.
    return chosen, picked, torch.linspace(states - 1, 0, size).round().long()


def _scale(program: Program, layer: fx.Node, bits: int) -> Tensor:
    return search_weight(layer_weight(program, layer), weight_spec(bits, weight_axis(layer)), candidates=_CANDIDATES)


def _rounded_weight(program: Program, layer: fx.Node, bits: int, scale: Tensor) -> dict[fx.Node, Any]:
    weight, constant = layer_weight(program, layer), weight_node(layer)
    spec = weight_spec(bits, weight_axis(layer))
    assert constant is not None
    return {constant: weight_codes(weight, scale, spec).float() * per_channel(scale, weight.dim(), spec.axis)}
