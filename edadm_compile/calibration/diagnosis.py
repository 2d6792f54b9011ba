"""Where a prediction that is not finite comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import scope_of, weight_node
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program


def explain(program: Program, inputs: Sequence[Tensor]) -> str:
    """Which layer first makes values that are not finite out of finite ones, as the rest of a sentence.

    Args:
        inputs: x, t and conditions of a call whose prediction is not finite.
    """
    if not bool(inputs[0].isfinite().all()):
        return "the sampler's state is not finite either: predictions of earlier steps were too large for the scheduler"
    for piece, _ in program.signature.batches(list(inputs)):
        watch = _Watch(program.graph_module)
        with torch.no_grad():
            watch.run(*program.graph_inputs(list(piece)))
        if watch.culprits:
            return _sentence(program, watch.culprits[0], watch.largest)
    return "it is finite when computed again: the model itself is random"


def _sentence(program: Program, node: fx.Node, largest: dict[fx.Node, float]) -> str:
    if node.op == "call_function":
        return f"{where(node)} makes it of finite values up to {largest[node]:.3g}"
    if node.op == "get_attr":
        return f"{node.target} holds NaN or infinite values, read by {where(next(iter(node.users)))}"
    return f"the input {node.target} holds NaN or infinite values"


def where(node: fx.Node) -> str:
    """A node's place for people: "layer mid.conv (aten.conv2d.default)", or "aten.sqrt.default behind layer mid.conv"."""
    name = op_name(node.target) if node.op == "call_function" else node.op
    if layer := layer_at(node):
        return f"layer {layer} ({name})"
    before = node
    while before.all_input_nodes and not layer_at(before):
        before = before.all_input_nodes[0]
    return f"{name} behind layer {layer}" if (layer := layer_at(before)) else f"{name} ({node.name})"


def layer_at(node: fx.Node) -> str:
    """Module path of a node, else the name of its weight; "" where it has neither."""
    scope = scope_of(node)
    if scope:
        return scope[-1]
    weight = weight_node(node) if node.op == "call_function" and len(node.args) > 1 else None
    return "" if weight is None else str(weight.target).removesuffix(".weight")


class _Watch(fx.Interpreter):
    """Runs a graph and follows values that are not finite from where they arise to the output.

    Those that a later operator makes finite again, such as a mask of minus infinities under a softmax, are forgotten.

    Attributes:
        culprits: nodes that make them out of finite values, or inputs and constants that hold them, and from which they
            reach the output; in the order that they are read.
        largest: largest magnitude that such a node read.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.culprits: list[fx.Node] = []
        self.largest: dict[fx.Node, float] = {}
        self._origins: dict[fx.Node, list[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = [v for source in n.all_input_nodes if isinstance(v := self.env[source], Tensor)]
        result = super().run_node(n)
        sources = list(dict.fromkeys(o for source in n.all_input_nodes for o in self._origins.get(source, [])))
        if n.op == "output":
            self.culprits = sources
        elif isinstance(result, Tensor) and result.is_floating_point() and not bool(result.isfinite().all()):
            if all(bool(v.isfinite().all()) for v in read):
                sources = [n]
                self.largest[n] = max((float(v.abs().max()) for v in read if v.numel()), default=0.0)
            self._origins[n] = sources
        return result
