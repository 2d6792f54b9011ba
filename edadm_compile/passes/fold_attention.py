"""Single-head self-attention with half of its projections, for engines where each projection costs a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import is_layer, propagate_shapes, shape_of
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, set_constant
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.passes.insert_quant import layer_name

aten = torch.ops.aten
_VIEWS = (
    "aten.reshape.default",
    "aten.view.default",
    "aten.transpose.int",
    "aten.unsqueeze.default",
    "aten.squeeze.dim",
)  # where they move dimensions of size 1 only: `_keeps_order`


@dataclass(frozen=True)
class FoldAttention:
    """Float graph to float graph; runs only with ``deploy = "onnxruntime"``.

    1. linear_o(attention(linear_q(h), linear_k(h), linear_v(h))) with one head →
       linear_vo(softmax(linear_qk(h) hᵀ) h), where linear_qk has weight ``s Wkᵀ Wq`` and bias ``s Wkᵀ bq``, linear_vo
       weight ``Wo Wv`` and bias ``Wo bv + bo``, and s is the scale of the scores

    Exact up to rounding: terms of the scores that are the same for all keys cancel in the softmax, whose rows sum to 1.
    """

    name: str = "fold_attention"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rewrite every matching attention."""
        if ctx.config.deploy != "onnxruntime":
            return PassResult(program, False, {"folded": 0})
        count = 0
        for node in list(program.graph_module.graph.nodes):
            found = _match(node) if op_name(node.target) == "aten.scaled_dot_product_attention.default" else None
            if found is not None:
                _fold(program, node, found)
                count += 1
        program = finish(program)
        propagate_shapes(program)
        return PassResult(program, count > 0, {"folded": count})


@dataclass(frozen=True)
class _Attention:
    """Projections of queries, keys and values, the output projection, and the number that scales the scores."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    out: fx.Node
    scale: float


def _match(node: fx.Node) -> _Attention | None:
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    if mask is not None or dropout or argument(node, 5, "is_causal", False) or shape_of(node)[1:2] != (1,):
        return None
    sources = [_projection(a) for a in node.args[:3]]
    out = _single_reader(node)
    if out is None or any(s is None for s in sources):
        return None
    q, k, v = sources
    assert q is not None and k is not None and v is not None
    if not all(_constant_bias(layer) for layer in (q, k, v, out)):
        return None
    tokens = shape_of(q)[1:2]  # the same tokens ask and answer, and nothing but the views lies between
    same = q.args[0] is k.args[0] is v.args[0] and tokens == shape_of(node)[2:3] == shape_of(out)[1:2]
    if not same or len(shape_of(q)) != 3:
        return None
    scale = argument(node, 6, "scale")
    return _Attention(q, k, v, out, 1 / math.sqrt(shape_of(node.args[0])[-1]) if scale is None else scale)  # type: ignore


def _projection(value: Any) -> fx.Node | None:
    """The linear layer behind views that only add a head dimension, read by nothing else."""
    while isinstance(value, fx.Node) and _keeps_order(value) and len(value.users) == 1:
        value = value.args[0]
    is_linear = isinstance(value, fx.Node) and op_name(value.target) == "aten.linear.default" and is_layer(value)
    return value if is_linear and len(value.users) == 1 else None


def _single_reader(node: fx.Node) -> fx.Node | None:
    """The linear layer in front of which only views remove the head dimension again."""
    reader: fx.Node = node
    while len(reader.users) == 1:
        reader = next(iter(reader.users))
        if op_name(reader.target) == "aten.linear.default" and is_layer(reader):
            return reader if len(shape_of(reader)) == 3 else None
        if not _keeps_order(reader):
            return None
    return None


def _keeps_order(node: fx.Node) -> bool:
    """Whether a node is a view that adds, removes or moves dimensions of size 1 and leaves the others in their order."""
    if op_name(node.target) not in _VIEWS:
        return False
    before, after = shape_of(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    if [n for n in before if n != 1] != [n for n in after if n != 1]:
        return False
    if op_name(node.target) != "aten.transpose.int":
        return True
    first, last = sorted(int(d) % len(before) for d in node.args[1:3])  # type: ignore[arg-type]
    return sum(n != 1 for n in before[first : last + 1]) <= 1


def _constant_bias(layer: fx.Node) -> bool:
    bias = argument(layer, 2, "bias")
    return bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")


def _fold(program: Program, node: fx.Node, a: _Attention) -> None:
    graph, tokens = program.graph_module.graph, a.q.args[0]
    wq, wk, wv, wo = (_constant(program, n, 1).double() for n in (a.q, a.k, a.v, a.out))
    bq, bv, bo = (_bias(program, n) for n in (a.q, a.v, a.out))
    qk = (a.scale * wk.t() @ wq, a.scale * wk.t() @ bq)
    vo = (wo @ wv, wo @ bv + bo)
    with graph.inserting_before(node):
        asked = _linear(program, tokens, f"{layer_name(a.q)}_k", qk)
        keys = graph.call_function(aten.transpose.int, (tokens, -2, -1))
        scores = graph.call_function(aten.matmul.default, (asked, keys))
        weights = graph.call_function(aten.softmax.int, (scores, -1))
        mixed = graph.call_function(aten.matmul.default, (weights, tokens))
    with graph.inserting_before(a.out):
        result = _linear(program, mixed, f"{layer_name(a.v)}_out", vo)
    for new, like in ((asked, a.q), (keys, node), (scores, node), (weights, node), (mixed, node), (result, a.out)):
        new.meta = {"scope": like.meta.get("scope", ())}
    a.out.replace_all_uses_with(result)
    # Attention counts as random (it has a dropout), which dead code elimination leaves in place.
    dead: Any = a.out
    while dead is not node:
        behind, dead = dead, dead.args[0]
        graph.erase_node(behind)
    graph.erase_node(node)


def _constant(program: Program, layer: fx.Node, position: int) -> Tensor:
    return get_constant(program.graph_module, str(layer.args[position].target))  # type: ignore[union-attr]


def _bias(program: Program, layer: fx.Node) -> Tensor:
    if argument(layer, 2, "bias") is None:
        return torch.zeros(_constant(program, layer, 1).shape[0], dtype=torch.float64)
    return _constant(program, layer, 2).double()


def _linear(program: Program, x: Any, name: str, values: tuple[Tensor, Tensor]) -> fx.Node:
    graph = program.graph_module.graph
    taken = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    while name in taken:
        name += "_"
    constants = []
    for part, value in zip(("weight", "bias"), values, strict=True):
        set_constant(program.graph_module, f"{name}.{part}", value.float())
        constants.append(graph.get_attr(f"{name}.{part}"))
    return graph.call_function(aten.linear.default, (x, *constants))
