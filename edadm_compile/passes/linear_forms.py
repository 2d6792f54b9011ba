"""The spellings of a matrix product with a constant: `canonicalize` brings them to ``linear``, one name per layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import constant_target, is_layer, scope_of, shape_of
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, child_name, get_constant, set_constant
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.passes.rewrites import fresh_name

aten = torch.ops.aten


def unify_linears(program: Program) -> int:
    """Rule 7: matrix products with a constant matrix; returns how many nodes changed."""
    rules = {"aten.addmm.default": _from_addmm, "aten.mm.default": _from_matmul, "aten.matmul.default": _from_matmul,
             "aten.einsum.default": _from_einsum}  # fmt: skip
    count = 0
    for node in list(program.graph_module.graph.nodes):
        rule = rules.get(op_name(node.target)) if node.op == "call_function" else None
        count += rule is not None and rule(program, node)
    return count


def _from_addmm(program: Program, node: fx.Node) -> bool:
    """Rewrite addmm(b, x, W, beta, alpha) → linear(x, (alpha W)ᵀ, beta b)."""
    bias, x, w = node.args[:3]
    weight, constant = _value(program, w), _value(program, bias)
    if weight is None or constant is None or weight.dim() != 2 or constant.dim() != 1:
        return False
    alpha, beta = float(node.kwargs.get("alpha", 1)), float(node.kwargs.get("beta", 1))  # type: ignore[arg-type]
    new_bias: Any = bias
    if beta != 1:
        new_bias = _constant(program, node, f"{constant_target(bias)}_folded", constant * beta)
    new_weight = _constant(program, node, f"{constant_target(w)}_t", (weight * alpha).t().contiguous())
    node.target, node.args, node.kwargs = aten.linear.default, (x, new_weight, new_bias), {}
    return True


def _from_matmul(program: Program, node: fx.Node) -> bool:
    """Rewrite x W → linear(x, Wᵀ) and W x → linear(xᵀ, W)ᵀ."""
    left, right = node.args
    weight = _value(program, right)
    if weight is not None and weight.dim() == 2:
        new_weight = _constant(program, node, f"{constant_target(right)}_t", weight.t().contiguous())
        node.target, node.args = aten.linear.default, (left, new_weight, None)
        return True
    weight = _value(program, left)
    if weight is None or weight.dim() != 2 or len(shape_of(right)) < 2:  # type: ignore[arg-type]
        return False
    return _replace(node, _linear(node, node.graph, right, left, [-2, -1]))


def _linear(node: fx.Node, graph: fx.Graph, x: Any, weight: Any, swap: list[int]) -> fx.Node:
    """Insert linear(xᵀ, weight)ᵀ in front of `node`."""
    with graph.inserting_before(node):
        turned = graph.call_function(aten.transpose.int, (x, *swap))
        product = graph.call_function(aten.linear.default, (turned, weight, None))
        result = graph.call_function(aten.transpose.int, (product, *swap))
    return _with_scope(node, turned, product, result)


def _from_einsum(program: Program, node: fx.Node) -> bool:
    """Rewrite einsum over a tensor and a constant matrix with one summed index (score_sde's NIN) → permuted linear."""
    operands = node.args[1]
    equation = str(node.args[0]).replace(" ", "")
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or "." in equation or "->" not in equation:
        return False
    names, out = equation.split("->")
    terms = names.split(",")
    place = next((i for i in (0, 1) if (w := _value(program, operands[i])) is not None and w.dim() == 2), None)
    if place is None:
        return False
    matrix, given = terms[place], terms[1 - place]
    summed, new = [c for c in matrix if c in given], [c for c in matrix if c not in given]
    kept = [c for c in given if c not in matrix]
    plain = all(len(set(t)) == len(t) for t in (matrix, given, out))
    if not (plain and len(summed) == len(new) == 1 and sorted(out) == sorted([*kept, *new])):
        return False
    weight: Any = operands[place]
    value = _value(program, weight)
    assert value is not None
    if matrix[0] in summed:  # stored [in, out]
        weight = _constant(program, node, f"{constant_target(weight)}_t", value.t().contiguous())
    graph, order = node.graph, [*kept, *new]
    with graph.inserting_before(node):
        moved = graph.call_function(
            aten.permute.default, (operands[1 - place], [given.index(c) for c in [*kept, *summed]])
        )
        product = graph.call_function(aten.linear.default, (moved, weight, None))
        result = graph.call_function(aten.permute.default, (product, [order.index(c) for c in out]))
    return _replace(node, _with_scope(node, moved, product, result))


def separate_layers(program: Program) -> int:
    """Rule 10: a layer whose name another layer has (a module called twice, tied weights) gets a constant of its own.

    Scales and codes belong to one use of a weight: each use reads other activations.
    """
    graph, module = program.graph_module.graph, program.graph_module
    layers = [n for n in graph.nodes if is_layer(n)]
    uses = Counter(layer_name(n) for n in layers)
    seen: set[str] = set()
    count = 0
    for node in layers:
        base = _own_name(node) if uses[layer_name(node)] > 1 else layer_name(node)
        name, serial = base, 1
        while name in seen:
            serial += 1
            name = child_name(module, base, f"use{serial}")
        seen.add(name)
        if name != layer_name(node):
            value = get_constant(module, str(node.args[1].target))
            set_constant(module, f"{name}.weight", value)
            with graph.inserting_before(node):
                node.args = (node.args[0], graph.get_attr(f"{name}.weight"), *node.args[2:])
            count += 1
    return count


def _own_name(node: fx.Node) -> str:
    """For a weight that is used several times: the module that uses it here (tied weights have one name in the graph)."""
    name, scope = layer_name(node), (scope_of(node) or ("",))[-1]
    return name if not scope or f"{name}.".startswith(f"{scope}.") else scope


def _value(program: Program, node: Any) -> Tensor | None:
    target = constant_target(node)
    return None if target is None else get_constant(program.graph_module, target)


def _constant(program: Program, node: fx.Node, name: str, value: Tensor) -> fx.Node:
    graph = node.graph
    name = fresh_name(graph, name)
    set_constant(program.graph_module, name, value)
    with graph.inserting_before(node):
        return graph.get_attr(name)


def _with_scope(node: fx.Node, *new: fx.Node) -> fx.Node:
    for item in new:
        item.meta = {"scope": node.meta.get("scope", ())}
    return new[-1]


def _replace(node: fx.Node, value: fx.Node) -> bool:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    return True
