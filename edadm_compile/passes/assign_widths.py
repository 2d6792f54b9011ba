"""Decide the width of every layer: by role, by the user's rules, and by measured sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from edadm_compile.ir.analysis import (
    BATCH,
    constant_target,
    dependencies,
    is_layer,
    layer_weight,
    shape_of,
    weight_node,
    x_dependent,
)
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import LayerInfo, Program, layer_of
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.passes.sensitivity import sensitivities

#: Products of two activations, and layers without an integer lowering: operator -> kind in the truth table.
_PRODUCTS = {
    "aten.scaled_dot_product_attention.default": "attention", "aten.bmm.default": "matmul",
    "aten.matmul.default": "matmul", "aten.einsum.default": "matmul", "aten.baddbmm.default": "matmul",
    "aten.conv1d.default": "conv1d", "aten.conv3d.default": "conv3d", "aten.conv2d.padding": "conv2d",
    "aten.mm.default": "matmul", "aten.addmm.default": "matmul", "aten.bilinear.default": "bilinear",
    "aten.conv_transpose1d.default": "conv_transpose1d", "aten.convolution.default": "convolution",
}  # fmt: skip
#: Above this many parameters one forward per layer is too slow; the resolution rule decides instead.
MEASURE_LIMIT = 100_000_000
#: Promotion stops when the predicted signal-to-noise ratio of the remaining weights passes this (dB).
_TARGET_DB = 40.0


@dataclass(frozen=True)
class AssignWidths:
    """Annotates a float graph; changes no operator.

    1. layer that reads x (stem) → W8, its input 16-bit (8-bit when uniform or baseline)
    2. layer that writes the output (head) → W8A8
    3. layer of the time path that was not folded, or without an integer lowering → float, with the reason
    4. every other layer → the requested widths
    5. below 8 bits, unless uniform: layers whose rounding hurts the output most per stored bit → W8, inputs at least
       A8, while all 8-bit layers together hold at most ``promoted_share`` of the parameters
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
        if not ctx.config.uniform and ctx.config.recipe.edges and min(ctx.config.weight_bits, ctx.config.act_bits) < 8:
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
            roles[node] = (
                "constant" if deps[node] <= {BATCH} else "time" if deps[node] <= {t, BATCH} else "conditioning"
            )
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
    if role == "time" and not config.recipe.time_tables:
        role = "inner"  # the method quantizes the time path like everything else
        info = replace(info, role=role)
    reason = _no_lowering(node, kind, role)
    if reason:
        return replace(info, weight_bits=32, act_bits=32, note=reason)
    strict = config.uniform or not config.recipe.edges
    if role == "stem":
        note = "reads x" if strict else "reads x: 16-bit input as two int8 terms"
        return replace(info, weight_bits=8, act_bits=8 if strict else 16, note=note)
    if role == "head":
        return replace(info, weight_bits=8, act_bits=max(8, config.act_bits), note="writes the output")
    return info


def _no_lowering(node: fx.Node, kind: str, role: str) -> str:
    if role == "time":
        return "time path that could not be folded into a table"
    if role == "constant":
        return "its input is the same for every sample and step"
    bias = argument(node, 2, "bias")
    if bias is not None and constant_target(bias) is None:
        return "its bias is computed while the model runs"
    rank = len(shape_of(weight_node(node))), len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if rank[0] != (2 if kind == "linear" else 4) or (kind != "linear" and rank[1] != 4):
        return f"weight with {rank[0]} dimensions on an input with {rank[1]} has no integer lowering"
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
        if ctx.config.attention == "int8" and name == "aten.matmul.default" and _same_batches(node):
            node.meta["layer"] = replace(info, weight_bits=8, act_bits=8)
        else:
            note = "product of two activations, float library kernel (--attention int8 quantizes it)"
            if kind == "matmul" and any(constant_target(a) for a in node.all_input_nodes):
                note = "product with a constant in an unusual form has no integer lowering"
            if kind not in ("attention", "matmul"):
                note = f"{name} with a computed weight or an unusual form has no integer lowering"
            elif ctx.config.attention == "int8":
                note = "attention with a mask, dropout or an unusual form stays float"
            node.meta["layer"] = replace(info, note=note)


def _same_batches(node: fx.Node) -> bool:
    """Whether both operands of a matmul have the same leading sizes (nothing is broadcast)."""
    a, b = (shape_of(n) for n in node.args[:2])  # type: ignore[arg-type]
    return len(a) == len(b) >= 2 and a[:-2] == b[:-2]


def _layer_nodes(program: Program) -> list[fx.Node]:
    return [n for n in program.graph_module.graph.nodes if is_layer(n) and (i := layer_of(n)) and i.weight_bits < 32]


def average_bits(program: Program) -> float:
    """Average weight width over the quantized layers, weighted by parameters."""
    infos = [i for n in _layer_nodes(program) if (i := layer_of(n))]
    total = sum(math.prod(i.weight_shape) for i in infos)
    return sum(math.prod(i.weight_shape) * i.weight_bits for i in infos) / total if total else 0.0


def _wide_share(program: Program, promoted: list[str]) -> float:
    """Share of the parameters in layers that are 8 bits wide by role or by promotion."""
    infos = [i for n in _layer_nodes(program) if (i := layer_of(n))]
    wide = [i for i in infos if i.role in ("stem", "head") or i.name in promoted]
    return sum(math.prod(i.weight_shape) for i in wide) / sum(math.prod(i.weight_shape) for i in infos)


def _promote(program: Program, ctx: Context) -> dict[str, Any]:
    config = ctx.config
    candidates = [n for n in _layer_nodes(program) if (i := layer_of(n)) and i.role in ("inner", "conditioning")]
    size = sum(layer_weight(program, n).numel() for n in candidates)
    measured = size <= MEASURE_LIMIT
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
        if _wide_share(program, promoted=[*promoted, info.name]) > config.promoted_share:
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
                elif (
                    not info.weight_shape
                ):  # a product runs in int8 or not at all: 16-bit codes would overflow its int32 sums
                    weight = act = 8
                info = replace(info, weight_bits=weight, act_bits=act, note=f"rule {rule.pattern!r}")
        node.meta["layer"] = info
