"""The structural rewrites of `canonicalize`, one function per rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import constant_target, shape_of
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, set_constant

aten = torch.ops.aten
#: Higher-order operators that only change how autograd treats their body: position of (body, first operand).
_TRANSPARENT = {
    "wrap_with_set_grad_enabled": (1, 2),
    "tag_activation_checkpoint": (0, 1),
    "wrap": (0, 1),
    "invoke_subgraph": (0, 2),
}


def inline_subgraphs(program: Program) -> int:
    """Inline bodies of transparent higher-order operators until none is left; returns how many."""
    module, count = program.graph_module, 0
    while True:
        found = next(
            (n for n in module.graph.nodes if n.op == "call_function" and op_name(n.target) in _TRANSPARENT), None
        )
        if found is None:
            return count
        _inline(module, found)
        count += 1


def _inline(module: fx.GraphModule, call: fx.Node) -> None:
    position, first = _TRANSPARENT[op_name(call.target)]
    body_node = call.args[position]
    assert isinstance(body_node, fx.Node)
    body = module.get_submodule(str(body_node.target))
    assert isinstance(body, fx.GraphModule)
    graph = module.graph
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[fx.Node, Any] = dict(zip(inputs, call.args[first:], strict=True))
    with graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                value: Any = body
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                name = f"{body_node.target}.{node.target}"
                if not isinstance(value, fx.GraphModule) and not hasattr(body, str(node.target)):
                    set_constant(module, name, value)
                mapping[node] = graph.get_attr(name)
            else:
                mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {"scope": call.meta.get("scope", ()), "val": node.meta.get("val")}
    results: Any = fx.node.map_arg(body.graph.output_node().args[0], lambda n: mapping[n])
    for user in list(call.users):
        if op_name(user.target) == "operator.getitem":
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0] if isinstance(results, (tuple, list)) else results)
    graph.erase_node(call)


def unify_convolutions(program: Program) -> int:
    """Rule 6; returns how many nodes changed."""
    count = 0
    for node in list(program.graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node.target)
        if name == "aten.convolution.default":
            _from_convolution(node)
        elif name in ("aten.conv2d.padding", "aten.conv1d.padding"):
            _from_string_padding(program, node)
        name = op_name(node.target)
        if name in ("aten.conv1d.default", "aten.conv_transpose1d.default"):
            count += _lift_1d(program, node)
    return count


def _from_convolution(node: fx.Node) -> None:
    x, w, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    one = len(stride) == 1  # type: ignore[arg-type]
    if transposed:
        node.target = aten.conv_transpose1d.default if one else aten.conv_transpose2d.input
        node.args = (x, w, bias, stride, padding, output_padding, groups, dilation)
    elif len(stride) <= 2:  # type: ignore[arg-type]
        node.target = aten.conv1d.default if one else aten.conv2d.default
        node.args = (x, w, bias, stride, padding, dilation, groups)


def _from_string_padding(program: Program, node: fx.Node) -> None:
    """``padding="valid"`` is 0; ``"same"`` is dilation * (k - 1) in all, an odd one with the extra zero on the far side."""
    kernel = shape_of(node.args[1])[2:]  # type: ignore[arg-type]
    rank = len(kernel)
    mode = argument(node, 4, "padding", "valid")
    stride, dilation = (spread(argument(node, i, n, 1), rank) for i, n in ((3, "stride"), (5, "dilation")))
    total = [d * (k - 1) if mode == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    x = node.args[0]
    if any(t % 2 for t in total):
        graph = node.graph
        with graph.inserting_before(node):
            sides = [s for t in reversed(total) for s in (0, t % 2)]
            x = graph.call_function(aten.constant_pad_nd.default, (x, sides, 0.0))
        x.meta = {"scope": node.meta.get("scope", ())}
    node.target = aten.conv2d.default if rank == 2 else aten.conv1d.default
    groups = argument(node, 6, "groups", 1)
    node.args = (x, node.args[1], argument(node, 2, "bias"), stride, [t // 2 for t in total], dilation, groups)
    node.kwargs = {}


def spread(value: Any, rank: int) -> list[int]:
    """An int or a list as a list of `rank` ints."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _lift_1d(program: Program, node: fx.Node) -> int:
    """conv1d on [B, C, L] becomes conv2d on [B, C, 1, L]."""
    weight = constant_target(node.args[1])
    if weight is None:
        return 0
    graph = program.graph_module.graph
    transposed = "transpose" in op_name(node.target)
    stride = pair_1d(argument(node, 3, "stride", [1]), 1)
    padding = pair_1d(argument(node, 4, "padding", [0]), 0)
    lifted = f"{weight}_2d"
    set_constant(program.graph_module, lifted, get_constant(program.graph_module, weight).unsqueeze(2))
    with graph.inserting_before(node):
        x = graph.call_function(aten.unsqueeze.default, (node.args[0], 2))
        w = graph.get_attr(lifted)
        bias = argument(node, 2, "bias")
        if transposed:
            extra = pair_1d(argument(node, 5, "output_padding", [0]), 0)
            groups, dilation = argument(node, 6, "groups", 1), pair_1d(argument(node, 7, "dilation", [1]), 1)
            conv = graph.call_function(
                aten.conv_transpose2d.input, (x, w, bias, stride, padding, extra, groups, dilation)
            )
        else:
            dilation, groups = pair_1d(argument(node, 5, "dilation", [1]), 1), argument(node, 6, "groups", 1)
            conv = graph.call_function(aten.conv2d.default, (x, w, bias, stride, padding, dilation, groups))
        result = graph.call_function(aten.squeeze.dim, (conv, 2))
    for new in (x, conv, result):
        new.meta = {"scope": node.meta.get("scope", ())}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return 1


def pair_1d(value: Any, unit: int) -> list[int]:
    """A 1-D setting as the 2-D one with `unit` along the added height."""
    return [unit, value if isinstance(value, int) else value[0]]


#: Spellings of a norm with running statistics, and where they have eps.
_EPS_POSITION = {"aten.batch_norm.default": 7, "aten._native_batch_norm_legit_no_training.default": 6}


def fold_batch_norm(program: Program) -> int:
    """Rule 8: ``y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta`` is a convolution with other constants."""
    count = 0
    for node in list(program.graph_module.graph.nodes):
        if node.op != "call_function" or op_name(node.target) not in _EPS_POSITION:
            continue
        training = op_name(node.target) == "aten.batch_norm.default" and node.args[5]
        conv = node.args[0]
        if not isinstance(conv, fx.Node) or op_name(conv.target) != "aten.conv2d.default" or len(conv.users) != 1:
            continue
        constants = [_constant_value(program, a) for a in (conv.args[1], *node.args[1:5])]
        bias = argument(conv, 2, "bias")
        if (
            any(c is None for c in constants)
            or training
            or not _gives_one_value(node)
            or (bias is not None and constant_target(bias) is None)
        ):
            continue
        _fold_into(program, conv, node, constants)  # type: ignore[arg-type]
        count += 1
    return count


def _constant_value(program: Program, node: Any) -> Tensor | None:
    target = constant_target(node)
    return None if target is None else get_constant(program.graph_module, target)


def _fold_into(program: Program, conv: fx.Node, norm: fx.Node, constants: list[Tensor]) -> None:
    weight, gamma, beta, mean, var = constants
    graph = program.graph_module.graph
    factor = gamma / torch.sqrt(var + float(norm.args[_EPS_POSITION[op_name(norm.target)]]))  # type: ignore[arg-type]
    bias = _constant_value(program, argument(conv, 2, "bias"))
    # A convolution that is called twice may meet two norms: the names must not clash.
    base = fresh_name(graph, f"{conv.args[1].target}_bn")  # type: ignore[union-attr]
    set_constant(program.graph_module, base, weight * factor[:, None, None, None])
    set_constant(program.graph_module, f"{base}_bias", beta + ((0 if bias is None else bias) - mean) * factor)
    with graph.inserting_before(conv):
        new_weight, new_bias = graph.get_attr(base), graph.get_attr(f"{base}_bias")
    conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])
    if op_name(norm.target) == "aten.batch_norm.default":
        norm.replace_all_uses_with(conv)
    for item in list(norm.users):
        item.replace_all_uses_with(conv)
        graph.erase_node(item)
    graph.erase_node(norm)


def _gives_one_value(norm: fx.Node) -> bool:
    """Whether only the normalised value is read; one of the spellings returns statistics beside it."""
    items = [op_name(u.target) == "operator.getitem" and u.args[1] == 0 for u in norm.users]
    return op_name(norm.target) == "aten.batch_norm.default" or all(items)


def fresh_name(graph: fx.Graph, base: str) -> str:
    """`base`, with a number behind it when a constant of the graph is called so already."""
    taken = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    name, serial = base, 1
    while name in taken:
        serial += 1
        name = f"{base}{serial}"
    return name


def match_swish(graph: fx.Graph) -> int:
    """Rule 9."""
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or op_name(node.target) != "aten.mul.Tensor":
            continue
        for x, gate in (node.args[:2], node.args[1::-1]):
            if isinstance(gate, fx.Node) and op_name(gate.target) == "aten.sigmoid.default" and gate.args[0] is x:
                node.target, node.args = aten.silu.default, (x,)
                count += 1
                break
    return count
