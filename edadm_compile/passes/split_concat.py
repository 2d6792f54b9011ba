"""Split layers that read a concatenation, so that each source keeps its own activation scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edadm_compile.ir.analysis import constant_target, is_layer, propagate_shapes, shape_of
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, child_name, get_constant, set_constant
from edadm_compile.passes.base import Context, PassResult, finish

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitConcat:
    """Float graph to float graph; found by dataflow, never by attribute or class name.

    1. conv2d(cat([a, b], 1), W, bias) → conv2d(a, W[:, :A], bias) + conv2d(b, W[:, A:])
    2. linear(cat([a, b], -1), W, bias) → linear(a, W[:, :A], bias) + linear(b, W[:, A:])

    Exact: both sides sum the same products. Grouped convolutions are left alone.
    """

    name: str = "split_concat"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rewrite every matching layer."""
        count = 0
        for node in list(program.graph_module.graph.nodes) if ctx.config.recipe.split else ():
            cat = _concat_input(node)
            if cat is not None:
                _split(program, node, cat)
                count += 1
        program = finish(program)
        propagate_shapes(program)
        return PassResult(program, count > 0, {"split_layers": count})


def _concat_input(node: fx.Node) -> fx.Node | None:
    """The concatenation a layer reads along its input channels, or None."""
    if not is_layer(node) or constant_target(node.args[1]) is None:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "call_function":
        return None
    if op_name(source.target) not in ("aten.cat.default", "aten.concat.default"):
        return None
    kind, rank = op_name(node.target), len(shape_of(source))
    dim = argument(source, 1, "dim", 0) % rank
    if kind == "aten.conv2d.default" and dim == 1 and argument(node, 6, "groups", 1) == 1:
        return source
    if kind == "aten.linear.default" and dim == rank - 1:
        return source
    return None


def _split(program: Program, node: fx.Node, cat: fx.Node) -> None:
    graph, module = program.graph_module.graph, program.graph_module
    target = constant_target(node.args[1])
    assert target is not None
    weight = get_constant(module, target)
    sources: Sequence[Any] = cat.args[0]  # type: ignore[assignment]
    dim = 1 if weight.dim() == 4 else len(shape_of(cat)) - 1
    pieces = weight.split([shape_of(s)[dim] for s in sources], dim=1)
    base = target.removesuffix("weight").rstrip(".")
    total: fx.Node | None = None
    with graph.inserting_before(node):
        for i, (source, piece) in enumerate(zip(sources, pieces, strict=True)):
            name = f"{child_name(module, base, f'part{i}')}.weight"
            set_constant(module, name, piece.contiguous())
            args = list(node.args)
            args[0], args[1] = source, graph.get_attr(name)
            if i and len(args) > 2:
                args[2] = None
            part = graph.call_function(node.target, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
            part.meta = {"scope": node.meta.get("scope", ()), "split_of": cat.name}
            if total is None:
                total = part
            else:
                total = graph.call_function(aten.add.Tensor, (total, part))
                total.meta = {"scope": node.meta.get("scope", ()), "split_sum": True}
    assert total is not None
    node.replace_all_uses_with(total)
    graph.erase_node(node)
