"""How much a program computes, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import fx

from edadm_compile.ir.analysis import is_batched, is_layer, shape_of, weight_node
from edadm_compile.ir.ops import op_name

_PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default")


def multiplications(nodes: Iterable[fx.Node]) -> float:
    """Multiplications of layers and products of two activations for one row of the batch."""
    return sum(_count(node) for node in nodes)


def layer_weights(nodes: Iterable[fx.Node]) -> int:
    """Elements of the weights of the layers among `nodes`."""
    return sum(math.prod(shape_of(w)) for n in nodes if is_layer(n) and (w := weight_node(n)) is not None)


def layer_multiplications(value: Sequence[int], weight: Sequence[int]) -> int:
    """Multiplications of a layer for one row: as many for each element of a value as the weight has behind it.

    Args:
        value: shape [B, ...] of the output; for a transposed convolution of the input.
        weight: shape [O, ...]; of a transposed convolution [I, ...].
    """
    return math.prod(value[1:]) * math.prod(weight[1:])


def value_counted(node: fx.Node) -> fx.Node:
    """The node whose value `layer_multiplications` takes for a layer."""
    value = node.args[0] if "transpose" in op_name(node.target) else node
    assert isinstance(value, fx.Node)
    return value


def _count(node: fx.Node) -> float:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return 0.0
    name, shape = op_name(node.target), shape_of(node)
    batched = is_batched(node)
    rows = shape[0] if batched and shape else 1
    weight = weight_node(node) if is_layer(node) else None
    if weight is not None:
        value = shape_of(value_counted(node))
        return layer_multiplications(value if batched else (1, *value), shape_of(weight))
    if name == "aten.scaled_dot_product_attention.default":
        q, k = shape, shape_of(node.args[1])  # type: ignore[arg-type]
        return 2.0 * math.prod(q) * k[-2] / rows if len(q) > 2 and len(k) > 2 else 0.0
    if name in _PRODUCTS:
        inner = shape_of(node.args[0])
        return math.prod(shape) * inner[-1] / rows if inner and shape else 0.0
    return 0.0
