"""How much each layer's weight rounding hurts the output, measured one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.calibration.dataset import Trajectories
from edadm_compile.ir.analysis import layer_weight, weight_node
from edadm_compile.ir.execute import evaluate
from edadm_compile.ir.program import Program, Signature
from edadm_compile.passes.base import Context
from edadm_compile.passes.insert_quant import layer_name, weight_axis
from edadm_compile.quant.affine import per_channel, weight_codes
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import weight_spec

#: Sampler states and trajectories of the measurement batch.
_STATES, _TRAJECTORIES = 8, 6
#: Clip candidates of the range search here; coarser than the real one, the error hardly changes.
_CANDIDATES = 40


def sensitivities(
    program: Program, nodes: Sequence[fx.Node], bits: int, ctx: Context
) -> tuple[dict[fx.Node, float], float]:
    """Squared output error when one layer's weight is rounded to `bits` and all else is float.

    Measured on a few float trajectories at evenly spread sampler steps plus the last two, where the error is
    largest; only nodes downstream of the layer are recomputed.

    Returns:
        (error by layer node, squared output of the float model on the same inputs).
    """
    inputs = measurement_inputs(ctx.calibration.trajectories, program.signature)
    module, graph = program.graph_module, program.graph_module.graph
    values: dict[fx.Node, Any] = {}
    arguments = iter(program.graph_inputs(inputs))
    ctx.progress.stage("sensitivity", len(nodes))
    with torch.no_grad():
        for node in graph.nodes:
            values[node] = next(arguments) if node.op == "placeholder" else evaluate(module, node, values)
        errors = {}
        for node in nodes:
            errors[node] = _error_with(program, node, bits, values)
            ctx.progress.advance(1, layer_name(node))
    return errors, float(values[graph.output_node()].double().square().sum())


def measurement_inputs(trajectories: Trajectories, signature: Signature) -> list[Tensor]:
    """A few states of the float trajectories as one batch of model inputs that the graph accepts."""
    steps = trajectories.t.numel()
    spread = torch.linspace(0, steps - 1, min(_STATES - 1, steps)).round().long()
    chosen = torch.cat((spread, torch.tensor([max(steps - 2, 0), steps - 1]))).unique()
    count = min(_TRAJECTORIES, trajectories.x.shape[1])
    x = trajectories.x[chosen, :count].flatten(0, 1)
    t = trajectories.t[chosen].repeat_interleave(count)
    conditions = [c[:count].repeat(chosen.numel(), *[1] * (c.dim() - 1)) for c in trajectories.conditions]
    size = min(max(x.shape[0], signature.min_batch), signature.max_batch)
    rows = torch.linspace(x.shape[0] - 1, 0, size).round().long()  # from the last step backwards: it matters most
    return [value[rows] for value in (x, t, *conditions)]


def _error_with(program: Program, layer: fx.Node, bits: int, values: dict[fx.Node, Any]) -> float:
    weight = layer_weight(program, layer)
    spec = weight_spec(bits, weight_axis(layer))
    scale = search_weight(weight, spec, candidates=_CANDIDATES)
    constant = weight_node(layer)
    assert constant is not None
    rounded = weight_codes(weight, scale, spec).float() * per_channel(scale, weight.dim(), spec.axis)
    changed: dict[fx.Node, Any] = {constant: rounded}
    for node in program.graph_module.graph.nodes:
        if node not in changed and any(n in changed for n in node.all_input_nodes):
            read = {n: changed.get(n, values[n]) for n in node.all_input_nodes}
            changed[node] = evaluate(program.graph_module, node, read)
    output = program.graph_module.graph.output_node()
    return float((changed[output] - values[output]).double().square().sum())
