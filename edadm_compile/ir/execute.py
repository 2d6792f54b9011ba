"""Run pieces of a graph node by node."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import fx

from edadm_compile.ir.analysis import last_read
from edadm_compile.ir.program import get_constant


def evaluate(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Value of one node (not an input) from the values of the nodes it reads."""
    if node.op == "get_attr":
        return get_constant(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "output":
        return args[0]
    target = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def run_nodes(
    module: fx.GraphModule, nodes: Sequence[fx.Node], values: dict[fx.Node, Any], wanted: Collection[fx.Node]
) -> None:
    """Evaluate `nodes` in order into `values`, which already holds what they read from outside.

    What none of them reads any more leaves `values` at once, except `wanted`.
    """
    done = last_read(nodes)
    for node in nodes:
        if node not in values:
            values[node] = evaluate(module, node, values)
        for source in done.get(node, ()):
            if source not in wanted:
                values.pop(source, None)
