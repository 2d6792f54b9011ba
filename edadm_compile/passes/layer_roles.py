"""What every layer is, by dataflow: its role, the widths that go with it, and the user's rules on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from edadm_compile.config import LayerRule, QuantConfig
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
from edadm_compile.passes.insert_quant import layer_name

#: Products of two activations, and layers without an integer lowering: operator -> kind in the truth table.
_PRODUCTS = {
    "aten.scaled_dot_product_attention.default": "attention", "aten.bmm.default": "matmul",
    "aten.matmul.default": "matmul", "aten.einsum.default": "matmul", "aten.baddbmm.default": "matmul",
    "aten.conv1d.default": "conv1d", "aten.conv3d.default": "conv3d", "aten.conv2d.padding": "conv2d",
    "aten.mm.default": "matmul", "aten.addmm.default": "matmul", "aten.bilinear.default": "bilinear",
    "aten.conv_transpose1d.default": "conv_transpose1d", "aten.convolution.default": "convolution",
}  # fmt: skip


def annotate(program: Program, config: QuantConfig) -> None:
    """Give every layer and every product of two activations its record: role, widths by role, reason."""
    for node, role in _roles(program).items():
        node.meta["layer"] = _default_info(program, node, role, config)
    _annotate_products(program, config)


def quantized_layers(program: Program) -> list[fx.Node]:
    """Layers with a constant weight that run in integers, in graph order."""
    return [n for n in program.graph_module.graph.nodes if is_layer(n) and (i := layer_of(n)) and i.weight_bits < 32]


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


def _default_info(program: Program, node: fx.Node, role: str, config: QuantConfig) -> LayerInfo:
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


def _annotate_products(program: Program, config: QuantConfig) -> None:
    """Products of two activations are layers of the truth table too."""
    for node in program.graph_module.graph.nodes:
        name = op_name(node.target) if node.op == "call_function" else ""
        kind = _PRODUCTS.get(name) or (LAYER_OPS.get(name) if layer_of(node) is None else None)
        if kind is None or layer_of(node) is not None:
            continue
        scope = node.meta.get("scope", ())
        label = f"{scope[-1] if scope else 'top'}.{node.name}"
        info = LayerInfo(label, kind, ())
        if config.attention == "int8" and name == "aten.matmul.default" and _same_batches(node):
            node.meta["layer"] = replace(info, weight_bits=8, act_bits=8)
        else:
            note = "product of two activations, float library kernel (--attention int8 quantizes it)"
            if kind == "matmul" and any(constant_target(a) for a in node.all_input_nodes):
                note = "product with a constant in an unusual form has no integer lowering"
            if kind not in ("attention", "matmul"):
                note = f"{name} with a computed weight or an unusual form has no integer lowering"
            elif config.attention == "int8":
                note = "attention with a mask, dropout or an unusual form stays float"
            node.meta["layer"] = replace(info, note=note)


def _same_batches(node: fx.Node) -> bool:
    """Whether both operands of a matmul have the same leading sizes (nothing is broadcast)."""
    a, b = (shape_of(n) for n in node.args[:2])  # type: ignore[arg-type]
    return len(a) == len(b) >= 2 and a[:-2] == b[:-2]


def apply_rules(program: Program, rules: Sequence[LayerRule]) -> None:
    """Write the user's rules into the records of a program."""
    for node in program.graph_module.graph.nodes:
        info = layer_of(node)
        if info is not None:
            node.meta["layer"] = ruled(info, rules)


def ruled(info: LayerInfo, rules: Sequence[LayerRule]) -> LayerInfo:
    """A layer's record after the rules that match it; layers that are float already stay so."""
    if info.weight_bits == 32:
        return info
    for rule in rules:
        if not rule.matches(info.name):
            continue
        weight = info.weight_bits if rule.weight_bits is None else rule.weight_bits
        act = info.act_bits if rule.act_bits is None else rule.act_bits
        if 32 in (weight, act):  # an integer kernel needs both operands in integers
            weight = act = 32
        elif not info.weight_shape:  # a product runs in int8 or not at all: 16-bit codes would overflow its int32 sums
            weight = act = 8
        info = replace(info, weight_bits=weight, act_bits=act, note=f"rule {rule.pattern!r}")
    return info
