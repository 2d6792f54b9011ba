"""Exact rewrites of a lowered graph at one batch size, before kernels are chosen."""

from __future__ import annotations

from typing import Any

from torch import fx

from edadm_compile.ir.analysis import fake_values
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program
from edadm_compile.ir.quantizers import QUANTIZE, drop_identity, quantize_first, share_quantizer, zero_padding


def specialise(program: Program, batch: int) -> Program:
    """Fix the batch size of a private copy and apply the rules below until none matches.

    1. a size or an expression of sizes → its value
    2. x / 1, x * 1 → x; alias, contiguous, dropout, permute that keeps the order → their input
    3. quantize(move(x)) → move(quantize(x)) for views, transposes and nearest upsampling: the tensor before is smaller
       or shared, and its producer can write the codes itself
    4. qconv2d(quantize(pad(x, 0)), padding) → qconv2d(quantize(x), padding of four sides): the code of zero pads both
    5. two quantizers with one input, scale and width → one

    Node values (fake tensors) are in ``node.meta["val"]``.
    """
    values = fake_values(program, batch)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        _fold_plain_value(node, values)
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            if node.op == "call_function" and node.users:
                changed |= drop_identity(node) or quantize_first(node) or _absorb_padding(node) or share_quantizer(node)
        graph.eliminate_dead_code()
    for node, value in fake_values(program, batch).items():
        node.meta["val"] = value
    return program


def _fold_plain_value(node: fx.Node, values: dict[fx.Node, Any]) -> None:
    value = values.get(node)
    if node.op == "call_function" and isinstance(value, (int, float, bool)):
        for user in list(node.users):
            user.args = fx.node.map_aggregate(user.args, lambda a: value if a is node else a)
            user.kwargs = fx.node.map_aggregate(user.kwargs, lambda a: value if a is node else a)


def _absorb_padding(node: fx.Node) -> bool:
    """Rule 4, on a qconv2d."""
    if op_name(node.target) != "edadm.qconv2d.default":
        return False
    codes = node.args[0]
    if not isinstance(codes, fx.Node) or codes.op != "call_function" or op_name(codes.target) != QUANTIZE:
        return False
    widths = zero_padding(codes.args[0])
    if widths is None:
        return False
    left, right, top, bottom = widths
    padding = list(node.args[6])  # type: ignore[arg-type]
    t, b, le, r = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    source = codes.args[0].args[0]  # type: ignore[union-attr]
    with node.graph.inserting_before(node):
        inner = node.graph.call_function(codes.target, (source, *codes.args[1:]))  # type: ignore[arg-type]
    inner.meta = dict(codes.meta)
    node.args = (inner, *node.args[1:6], [t + top, b + bottom, le + left, r + right], *node.args[7:])
    return True
