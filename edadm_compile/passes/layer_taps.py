"""Outputs of layers whose loss trains the roundings of their own weights and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.execute import evaluate


class _Tapped(torch.autograd.Function):
    """A layer with two equal outputs: the gradient of the second reaches the weight, but not the input.

    Each of input and weight needs one product of the backward pass, as without the tap.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            out = layer(*inputs)
        ctx.kept = (*inputs, out)
        return out.detach(), out.detach().clone()  # two tensors: autograd must not take them for one

    @staticmethod
    def backward(ctx: Any, down: Tensor, tap: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        x, weight, out = ctx.kept
        _, needs_x, needs_weight = ctx.needs_input_grad
        grad_x = torch.autograd.grad(out, x, down, retain_graph=needs_weight)[0] if needs_x else None
        grad_weight = torch.autograd.grad(out, weight, down + tap)[0] if needs_weight else None
        return None, grad_x, grad_weight


def run_tapped(
    module: fx.GraphModule, nodes: Iterable[fx.Node], values: dict[fx.Node, Any], layers: Collection[fx.Node]
) -> dict[fx.Node, Tensor]:
    """As `run_nodes`, and the output of each of `layers` once more, cut off from everything but the layer's own weight.

    Args:
        nodes: in order.
        values: what they read from outside; receives their values.
        layers: those of `nodes` to tap: calls whose first two arguments are the input and the weight.
    """
    taps: dict[fx.Node, Tensor] = {}
    for node in nodes:
        if node in layers:
            values[node], taps[node] = _Tapped.apply(_layer(node, values), *(values[a] for a in node.args[:2]))  # type: ignore[no-untyped-call,index]
        elif node not in values:
            values[node] = evaluate(module, node, values)
    return taps


def _layer(node: fx.Node, values: dict[fx.Node, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer as a function of its input and weight."""
    rest, named = fx.node.map_arg((node.args[2:], node.kwargs), lambda n: values[n])
    target: Any = node.target
    return lambda x, weight: target(x, weight, *rest, **named)
