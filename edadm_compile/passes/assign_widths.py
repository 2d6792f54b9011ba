"""Decide the width of every layer: by role, by the user's rules, and by measured sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.calibration.dataset import Trajectories
from edadm_compile.ir.analysis import (
    BATCH,
    dependencies,
    is_layer,
    layer_weight,
    shape_of,
    weight_node,
    x_dependent,
)  # fmt: skip
from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import LayerInfo, Program, get_constant, layer_of
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.insert_quant import layer_name, weight_axis
from edadm_compile.passes.rewrites import argument
from edadm_compile.quant.affine import per_channel, weight_codes
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import weight_spec

#: Products of two activations, and layers without an integer lowering: operator -> kind in the truth table.
_PRODUCTS = {
    "aten.scaled_dot_product_attention.default": "attention", "aten.bmm.default": "matmul",
    "aten.matmul.default": "matmul", "aten.einsum.default": "matmul", "aten.baddbmm.default": "matmul",
    "aten.conv1d.default": "conv1d", "aten.conv3d.default": "conv3d", "aten.conv2d.padding": "conv2d",
    "aten.mm.default": "matmul", "aten.addmm.default": "matmul", "aten.bilinear.default": "bilinear",
    "aten.conv_transpose1d.default": "conv_transpose1d", "aten.convolution.default": "convolution",
}  # fmt: skip
#: Sampler states and trajectories on which sensitivity is measured.
_STATES, _TRAJECTORIES = 8, 6
#: Above this many parameters one forward per layer is too slow; the resolution rule decides instead.
_MEASURE_LIMIT = 100_000_000
#: Promotion stops when the predicted signal-to-noise ratio of the remaining weights passes this (dB).
_TARGET_DB = 40.0


@dataclass(frozen=True)
class AssignWidths:
    """Annotates a float graph; changes no operator.

    1. layer that reads x (stem) → W8, its input 16-bit (8-bit when uniform or baseline)
    2. layer that writes the output (head) → W8A8
    3. layer of the time path that was not folded, or without an integer lowering → float, with the reason
    4. every other layer → the requested widths
    5. below 8-bit weights, unless uniform: layers whose rounding hurts the output most per stored bit → W8, while the
       average width stays within ``max_average_bits``; below 8-bit activations their inputs → A8
    6. the user's rules, last
    """

    name: str = "assign_widths"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Annotate every layer and every float product."""
        roles = _roles(program)
        for node, role in roles.items():
            node.meta["layer"] = _default_info(program, node, role, ctx)
        _annotate_products(program, ctx)
        stats: dict[str, Any] = {}
        if not ctx.config.uniform and not ctx.config.is_baseline and min(ctx.config.weight_bits, ctx.config.act_bits) < 8:
            stats = _promote(program, ctx)
        _apply_rules(program, ctx)
        return PassResult(program, True, {**stats, "average_bits": average_bits(program)})


def _roles(program: Program) -> dict[fx.Node, str]:
    """Role of every layer node, by dataflow."""
    graph = program.graph_module.graph
    layers = [n for n in graph.nodes if is_layer(n)]
    dependent, deps = x_dependent(graph), dependencies(graph)
    x = next(n for n in graph.nodes if n.op == "placeholder")
    # Only flows of values count: a reshape that asks x for its batch size does not read x.
    stems = _reach([x], lambda n: [u for u in n.users if u in dependent], set(layers))
    heads = _reach([graph.output_node()], lambda n: [i for i in n.all_input_nodes if i in dependent], set(layers))
    t = program.signature.inputs[1].name
    roles: dict[fx.Node, str] = {}
    for node in layers:
        if node not in dependent:
            roles[node] = "time" if deps[node] <= {t, BATCH} else "conditioning"
        else:
            roles[node] = "head" if node in heads else "stem" if node in stems else "inner"
    return roles


def _reach(start: Sequence[fx.Node], step: Any, stop: set[fx.Node]) -> set[fx.Node]:
    """Members of `stop` reachable from `start` without passing through another member."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(start)
    while stack:
        for node in step(stack.pop()):
            if node in stop:
                found.add(node)
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return found


def _default_info(program: Program, node: fx.Node, role: str, ctx: Context) -> LayerInfo:
    config = ctx.config
    kind = LAYER_OPS[op_name(node.target)]
    shape = tuple(layer_weight(program, node).shape)
    info = LayerInfo(layer_name(node), kind, shape, role, config.weight_bits, config.act_bits)
    reason = _no_lowering(node, kind, role)
    if reason:
        return replace(info, weight_bits=32, act_bits=32, note=reason)
    strict = config.uniform or config.is_baseline
    if role == "stem":
        note = "reads x" if strict else "reads x: 16-bit input as two int8 terms"
        return replace(info, weight_bits=8, act_bits=8 if strict else 16, note=note)
    if role == "head":
        return replace(info, weight_bits=8, act_bits=max(8, config.act_bits), note="writes the output")
    return info


def _no_lowering(node: fx.Node, kind: str, role: str) -> str:
    if role == "time":
        return "time path that could not be folded into a table"
    if kind == "conv_transpose2d" and argument(node, 6, "groups", 1) != 1:
        return "grouped transposed convolution has no integer lowering"
    if node.meta.get("dtype") not in (None, torch.float32):
        return f"computes in {node.meta['dtype']}, only float32 has an integer lowering"
    return ""


def _annotate_products(program: Program, ctx: Context) -> None:
    """Products of two activations are layers of the truth table too."""
    for node in program.graph_module.graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else ""
        kind = _PRODUCTS.get(name) or (LAYER_OPS.get(name) if layer_of(node) is None else None)
        if kind is None or layer_of(node) is not None:
            continue
        scope = node.meta.get("scope", ())
        label = f"{scope[-1] if scope else 'top'}.{node.name}"
        info = LayerInfo(label, kind, ())
        if kind == "matmul" and ctx.config.attention == "int8" and name == "aten.matmul.default":
            node.meta["layer"] = replace(info, weight_bits=8, act_bits=8)
        else:
            note = "product of two activations, float library kernel (--attention int8 quantizes it)"
            if kind not in ("attention", "matmul"):
                note = f"{name} with a computed weight or an unusual form has no integer lowering"
            elif ctx.config.attention == "int8":
                note = "attention with a mask, dropout or an unusual form stays float"
            node.meta["layer"] = replace(info, note=note)


def _layer_nodes(program: Program) -> list[fx.Node]:
    return [n for n in program.graph_module.graph.nodes if is_layer(n) and (i := layer_of(n)) and i.weight_bits < 32]


def average_bits(program: Program) -> float:
    """Average weight width over the quantized layers, weighted by parameters."""
    infos = [i for n in _layer_nodes(program) if (i := layer_of(n))]
    total = sum(math.prod(i.weight_shape) for i in infos)
    return sum(math.prod(i.weight_shape) * i.weight_bits for i in infos) / total if total else 0.0


def _promote(program: Program, ctx: Context) -> dict[str, Any]:
    config = ctx.config
    candidates = [n for n in _layer_nodes(program) if (i := layer_of(n)) and i.role in ("inner", "conditioning")]
    size = sum(layer_weight(program, n).numel() for n in candidates)
    measured = size <= _MEASURE_LIMIT
    if measured:
        errors, signal = sensitivities(program, candidates, config.weight_bits if config.weight_bits < 8 else 4, ctx)
    else:
        errors, signal = {n: 1.0 for n in candidates if at_input_resolution(program, n)}, 0.0
    ranked = sorted(errors, key=lambda n: (-errors[n] / layer_weight(program, n).numel(), n.name))
    remaining = sum(errors.values())
    promoted: list[str] = []
    for node in ranked:
        if measured and remaining <= signal * 10 ** (-_TARGET_DB / 10):
            break
        info = layer_of(node)
        assert info is not None
        note = "promoted: most output error per bit" if measured else "promoted: works at the input resolution"
        node.meta["layer"] = replace(info, weight_bits=8, act_bits=max(8, info.act_bits), note=note)
        if average_bits(program) > config.max_average_bits:
            node.meta["layer"] = info
            continue
        remaining -= errors[node]
        promoted.append(info.name)
    names = {layer_name(n): errors[n] / signal if signal else None for n in ranked}
    return {"promoted": promoted, "measured": measured, "sensitivity": names}


def at_input_resolution(program: Program, node: fx.Node) -> bool:
    """Whether a convolution reads or writes the resolution of x (includes the first downsampling convolution)."""
    size = program.signature.inputs[0].shape[1:]
    source = node.args[0]
    return any(isinstance(n, fx.Node) and shape_of(n)[2:] == size for n in (node, source)) and len(size) == 2


def sensitivities(program: Program, nodes: Sequence[fx.Node], bits: int, ctx: Context) -> tuple[dict[fx.Node, float], float]:
    """Squared output error when one layer's weight is rounded to `bits`, all else float, and the squared output.

    Measured on a few float trajectories at evenly spread sampler steps plus the last two, where the error is
    largest; only nodes downstream of the layer are recomputed.
    """
    inputs = measurement_inputs(ctx.calibration.trajectories)
    module, graph = program.graph_module, program.graph_module.graph
    values: dict[fx.Node, Any] = {}
    order = list(graph.nodes)
    arguments = iter(program.graph_inputs(inputs))
    ctx.progress.stage("sensitivity", len(nodes))
    with torch.no_grad():
        for node in order:
            values[node] = next(arguments) if node.op == "placeholder" else evaluate(node, values, module)
        reference = values[graph.output_node()]
        errors = {}
        for node in nodes:
            errors[node] = _error_with(node, bits, program, order, values, reference)
            ctx.progress.advance(1, layer_name(node))
    return errors, float(reference.double().square().sum())


def measurement_inputs(trajectories: Trajectories) -> list[Tensor]:
    """A few states of the float trajectories as one batch of model inputs."""
    steps = trajectories.t.numel()
    spread = torch.linspace(0, steps - 1, min(_STATES - 1, steps)).round().long()
    chosen = torch.cat((spread, torch.tensor([max(steps - 2, 0), steps - 1]))).unique()
    count = min(_TRAJECTORIES, trajectories.x.shape[1])
    x = trajectories.x[chosen, :count].flatten(0, 1)
    t = trajectories.t[chosen].repeat_interleave(count)
    conditions = [c[:count].repeat(chosen.numel(), *[1] * (c.dim() - 1)) for c in trajectories.conditions]
    return [x, t, *conditions]


def evaluate(node: fx.Node, values: dict[fx.Node, Any], module: fx.GraphModule) -> Any:
    """Value of one node from the values of its inputs."""
    if node.op == "get_attr":
        return get_constant(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "output":
        return args[0]
    target = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def _error_with(layer: fx.Node, bits: int, program: Program, order: list[fx.Node], values: dict[fx.Node, Any], reference: Tensor) -> float:
    weight = layer_weight(program, layer)
    spec = weight_spec(bits, weight_axis(layer))
    scale = search_weight(weight, spec, candidates=40)
    constant = weight_node(layer)
    assert constant is not None
    rounded = weight_codes(weight, scale, spec).float() * per_channel(scale, weight.dim(), spec.axis)
    changed: dict[fx.Node, Any] = {constant: rounded}
    for node in order:
        if node not in changed and any(n in changed for n in node.all_input_nodes):
            changed[node] = evaluate(node, {n: changed.get(n, values[n]) for n in node.all_input_nodes}, program.graph_module)
    return float((changed[order[-1]] - reference).double().square().sum())


def _apply_rules(program: Program, ctx: Context) -> None:
    for node in program.graph_module.graph.nodes:
        info = layer_of(node)
        if info is None or info.weight_bits == 32:
            continue
        for rule in ctx.config.rules:
            if rule.matches(info.name):
                weight = info.weight_bits if rule.weight_bits is None else rule.weight_bits
                act = info.act_bits if rule.act_bits is None else rule.act_bits
                if 32 in (weight, act):  # an integer kernel needs both operands in integers
                    weight = act = 32
                info = replace(info, weight_bits=weight, act_bits=act, note=f"rule {rule.pattern!r}")
        node.meta["layer"] = info
