"""Bring attention to two matrix products and a softmax, so that their operands can be quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edadm_compile.ir.analysis import propagate_shapes, shape_of
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program
from edadm_compile.passes.base import Context, PassResult, finish

aten = torch.ops.aten


@dataclass(frozen=True)
class DecomposeAttention:
    """Float graph to float graph; runs only for ``attention = "int8"``, the fused library form is kept otherwise.

    1. scaled_dot_product_attention(q, k, v) without mask or dropout → softmax((q kᵀ) * scale) v
    2. einsum over two operands that is a batched matrix product → matmul of permuted operands
    3. bmm(a, b) → matmul(a, b)
    """

    name: str = "decompose_attention"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rewrite every matching node."""
        if ctx.config.attention == "float":
            return PassResult(program, False, {"decomposed": 0})
        graph, count = program.graph_module.graph, 0
        for node in list(graph.nodes):
            name = op_name(node.target) if node.op == "call_function" else ""
            if name == "aten.scaled_dot_product_attention.default":
                count += _decompose_sdpa(graph, node)
            elif name == "aten.einsum.default":
                count += _decompose_einsum(graph, node)
            elif name == "aten.bmm.default":
                node.target = aten.matmul.default
                count += 1
        program = finish(program)
        propagate_shapes(program)
        return PassResult(program, count > 0, {"decomposed": count})


def _replace(node: fx.Node, value: fx.Node) -> int:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    return 1


def _decompose_sdpa(graph: fx.Graph, node: fx.Node) -> int:
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    causal, grouped = argument(node, 5, "is_causal", False), argument(node, 7, "enable_gqa", False)
    if mask is not None or dropout or causal or grouped:
        return 0
    q, k, v = node.args[:3]
    given = argument(node, 6, "scale")
    scale = 1 / math.sqrt(shape_of(q)[-1]) if given is None else given  # type: ignore[arg-type]
    scope = {"scope": node.meta.get("scope", ())}
    with graph.inserting_before(node):
        k_t = graph.call_function(aten.transpose.int, (k, -2, -1))
        scores = graph.call_function(aten.matmul.default, (q, k_t))
        scaled = graph.call_function(aten.mul.Tensor, (scores, scale))
        weights = graph.call_function(aten.softmax.int, (scaled, -1))
        result = graph.call_function(aten.matmul.default, (weights, v))
    for new in (k_t, scores, scaled, weights, result):
        new.meta = dict(scope)
    return _replace(node, result)


def _decompose_einsum(graph: fx.Graph, node: fx.Node) -> int:
    """``b i k, b j k -> b i j`` and its permutations; other equations stay as they are."""
    equation, operands = node.args[0], node.args[1]
    if (
        not isinstance(operands, (list, tuple))
        or len(operands) != 2
        or "." in str(equation)
        or "->" not in str(equation)
    ):
        return 0
    left, right, out = str(equation).replace(" ", "").replace("->", ",").split(",")
    batch = [c for c in out if c in left and c in right]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]
    inner = [c for c in left if c in right and c not in out]
    plain = [len(set(s)) == len(s) for s in (left, right, out)]
    if not (all(plain) and len(rows) == len(columns) == len(inner) == 1 and len(batch) + 2 == len(left) == len(right)):
        return 0
    scope = {"scope": node.meta.get("scope", ())}
    with graph.inserting_before(node):
        a = _permute(graph, operands[0], left, batch + rows + inner)
        b = _permute(graph, operands[1], right, batch + inner + columns)
        product = graph.call_function(aten.matmul.default, (a, b))
        result = _permute(graph, product, "".join(batch + rows + columns), list(out))
    for new in (a, b, product, result):
        if isinstance(new, fx.Node):
            new.meta.setdefault("scope", scope["scope"])
    return _replace(node, result)


def _permute(graph: fx.Graph, value: Any, have: str, want: list[str]) -> fx.Node:
    order = [have.index(c) for c in want]
    if order == sorted(order):
        return value  # type: ignore[no-any-return]
    return graph.call_function(aten.permute.default, (value, order))
