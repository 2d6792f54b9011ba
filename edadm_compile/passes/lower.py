"""Turn quantize/dequantize patterns into integer operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import constant_target, factor_after, propagate_shapes
from edadm_compile.ir.arguments import argument, pair
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import LayerInfo, Program, child_name, get_constant, layer_of, set_constant
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.quant import packing

edadm = torch.ops.edadm


@dataclass(frozen=True)
class Lower:
    """qdq graph to lowered graph.

    1. conv2d(dequantize(x_q), dequantize_weight(w_q), b) → edadm::qconv2d(x_q, w_q, s_x * s_w, b')
    2. conv_transpose2d of the same → edadm::qconv_transpose2d
    3. linear of the same → edadm::qlinear
    4. matmul(dequantize(a_q), dequantize(b_q)) → edadm::qmatmul(a_q, b_q, s_a * s_b); where its only reader multiplies
       with a number, that number joins the scale
    5. group_norm(x) → group_norm(contiguous(x)): torch adds in another order for other memory formats, and the result
       that defines what is right must not depend on how x happens to lie in memory

    b' = b - s_x * s_w * z * sum(w): the zero point leaves the inner loop because padding has the code z.
    Every layer that stays float keeps the reason it was given.
    """

    name: str = "lower"
    reads: str = "qdq"
    writes: str = "lowered"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Lower every annotated layer."""
        counts: dict[str, int] = {}
        for node in list(program.graph_module.graph.nodes):
            info = layer_of(node)
            if info is None:
                continue
            if info.weight_bits == 32:
                executed, note = "float", info.note
            else:
                executed, note = _lower_layer(program, node, info)
            node.meta["layer"] = replace(info, executed=executed, note=note)
            counts[executed] = counts.get(executed, 0) + 1
        _fix_order_of_sums(program.graph_module.graph)
        program = finish(replace(program, dialect="lowered")).fork()
        propagate_shapes(program)
        return PassResult(program, True, {"executed": counts})


def _fix_order_of_sums(graph: fx.Graph) -> None:
    """Rule 5."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node.target) == "aten.group_norm.default":
            with graph.inserting_before(node):
                node.args = (graph.call_function(torch.ops.aten.contiguous.default, (node.args[0],)), *node.args[1:])


def _lower_layer(program: Program, node: fx.Node, info: LayerInfo) -> tuple[str, str]:
    """Lower one layer; returns what is executed and the note."""
    rules: dict[str, Callable[..., Any]] = {
        "conv2d": _conv2d, "conv_transpose2d": _conv_transpose2d, "linear": _linear,
    }  # fmt: skip
    if info.kind == "matmul":
        _matmul(program, node, info)
        return "w8a8", info.note
    rules[info.kind](program, node, info)
    width = 4 if packing.storage_bits(info.weight_bits) == 4 else 8
    act = 16 if info.act_bits == 16 else 8
    note = info.note
    if (width, act) != (info.weight_bits, info.act_bits):
        extra = f"{info.weight_bits}/{info.act_bits}-bit codes in {width}/{act}-bit kernels"
        note = f"{note}; {extra}" if note else extra
    return f"w{width}a{act}", note


@dataclass(frozen=True)
class _Operands:
    """Constants of one weighted layer."""

    x_q: fx.Node
    w_q: fx.Node
    multiplier: Tensor
    bias: Tensor
    pad_value: int
    bits: int
    shape: list[int]


def _codes(node: Any) -> tuple[fx.Node, fx.Node, fx.Node]:
    """(codes, scale, zero point) nodes behind a dequantize."""
    assert op_name(node.target) == "edadm.dequantize.default", node
    return node.args  # type: ignore[no-any-return]


def _operands(program: Program, node: fx.Node) -> _Operands:
    module = program.graph_module
    x_q, scale_node, zero_node = _codes(node.args[0])
    w_q, w_scale_node, bits, shape, _axis = node.args[1].args  # type: ignore[union-attr]
    scale, zero = (get_constant(module, str(n.target)) for n in (scale_node, zero_node))
    w_scale = get_constant(module, str(w_scale_node.target))  # type: ignore[union-attr]
    codes = packing.unpack(get_constant(module, str(w_q.target)), int(bits), shape)  # type: ignore
    multiplier = scale * w_scale
    sums = codes.reshape(codes.shape[0], -1).double().sum(dim=1)
    bias = _float_bias(program, node, multiplier).double() - multiplier.double() * zero.double() * sums
    return _Operands(x_q, w_q, multiplier, bias.float(), int(zero), int(bits), list(shape))  # type: ignore


def _float_bias(program: Program, node: fx.Node, like: Tensor) -> Tensor:
    bias = argument(node, 2, "bias")
    if bias is None:
        return torch.zeros_like(like)
    target = constant_target(bias)
    assert target is not None, f"{node.name}: computed bias"
    return get_constant(program.graph_module, target)


def _constants(program: Program, node: fx.Node, info: LayerInfo, o: _Operands) -> tuple[fx.Node, fx.Node]:
    module = program.graph_module
    names = (child_name(module, info.name, "multiplier"), child_name(module, info.name, "bias_q"))
    nodes = []
    for name, value in zip(names, (o.multiplier, o.bias), strict=True):
        set_constant(module, name, value)
        with module.graph.inserting_before(node):
            nodes.append(module.graph.get_attr(name))
    return nodes[0], nodes[1]


def _conv2d(program: Program, node: fx.Node, info: LayerInfo) -> None:
    o = _operands(program, node)
    multiplier, bias = _constants(program, node, info, o)
    stride, padding, dilation = (
        pair(argument(node, 3 + i, n, d)) for i, (n, d) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1)))
    )
    groups = argument(node, 6, "groups", 1)
    node.target, node.kwargs = edadm.qconv2d.default, {}
    node.args = (o.x_q, o.w_q, multiplier, bias, o.pad_value, stride, padding, dilation, groups, o.bits, o.shape)


def _conv_transpose2d(program: Program, node: fx.Node, info: LayerInfo) -> None:
    o = _operands(program, node)
    multiplier, bias = _constants(program, node, info, o)
    stride, padding, extra = (
        pair(argument(node, 3 + i, n, d))
        for i, (n, d) in enumerate((("stride", 1), ("padding", 0), ("output_padding", 0)))
    )
    dilation = pair(argument(node, 7, "dilation", 1))
    node.target, node.kwargs = edadm.qconv_transpose2d.default, {}
    node.args = (o.x_q, o.w_q, multiplier, bias, o.pad_value, stride, padding, extra, dilation, 1, o.bits, o.shape)


def _linear(program: Program, node: fx.Node, info: LayerInfo) -> None:
    o = _operands(program, node)
    multiplier, bias = _constants(program, node, info, o)
    node.target, node.kwargs = edadm.qlinear.default, {}
    node.args = (o.x_q, o.w_q, multiplier, bias, o.bits, o.shape)


def _matmul(program: Program, node: fx.Node, info: LayerInfo) -> None:
    module = program.graph_module
    a, scale_a, zero_a = _codes(node.args[0])
    b, scale_b, zero_b = _codes(node.args[1])
    values = [get_constant(module, str(n.target)) for n in (scale_a, scale_b, zero_a, zero_b)]
    name = f"products.{node.name}.scale"
    factor, scaled = factor_after(node)
    if scaled is not None:
        scaled.replace_all_uses_with(node)
    set_constant(module, name, values[0] * values[1] * factor)
    with module.graph.inserting_before(node):
        scale = module.graph.get_attr(name)
    node.target, node.kwargs = edadm.qmatmul.default, {}
    node.args = (a, b, scale, int(values[2]), int(values[3]))
