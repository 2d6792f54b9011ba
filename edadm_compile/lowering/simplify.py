"""Exact rewrites of a lowered graph at one batch size, before kernels are chosen."""

from __future__ import annotations

from typing import Any

from torch import fx

from edadm_compile.ir.analysis import fake_values
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program

_QUANTIZE = "edadm.quantize.default"
#: Operators that rearrange or repeat whole elements: quantizing before or after gives the same codes.
_COMMUTING = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "permute.default", "transpose.int", "t.default",
        "contiguous.default", "clone.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default",
        "flatten.using_ints", "unflatten.int", "alias.default", "upsample_nearest2d.vec", "upsample_nearest2d.default",
        "movedim.int", "swapaxes.default",
    )
)  # fmt: skip
_IDENTITIES = frozenset(
    ("aten.alias.default", "aten.contiguous.default", "aten.detach.default", "aten.dropout.default")
)


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
                changed |= _identity(node) or _commute(node) or _absorb_padding(node) or _share(node)
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


def _identity(node: fx.Node) -> bool:
    name = op_name(node.target)
    by_one = name in ("aten.div.Tensor", "aten.mul.Tensor", "aten.div.Scalar", "aten.mul.Scalar") and (
        isinstance(node.args[1], (int, float)) and node.args[1] == 1
    )
    ordered = name == "aten.permute.default" and list(node.args[1]) == list(range(len(node.args[1])))  # type: ignore
    if not (by_one or ordered) and name not in _IDENTITIES:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    return True


def _commute(node: fx.Node) -> bool:
    if op_name(node.target) != _QUANTIZE:
        return False
    move = node.args[0]
    if not isinstance(move, fx.Node) or move.op != "call_function" or op_name(move.target) not in _COMMUTING:
        return False
    source = move.args[0]
    assert isinstance(source, fx.Node)
    with node.graph.inserting_before(node):
        codes = node.graph.call_function(node.target, (source, *node.args[1:]))  # type: ignore[arg-type]
        moved = node.graph.call_function(move.target, (codes, *move.args[1:]), dict(move.kwargs))  # type: ignore[arg-type]
    codes.meta, moved.meta = dict(node.meta), dict(move.meta)
    moved.meta.pop("layer", None)
    node.replace_all_uses_with(moved)
    return True


def _zero_padding(node: Any) -> list[int] | None:
    """Widths [left, right, top, bottom] of a zero padding of the last two dimensions, else None."""
    if not isinstance(node, fx.Node) or op_name(node.target) not in (
        "aten.pad.default",
        "aten.constant_pad_nd.default",
    ):
        return None
    if node.kwargs:
        return None
    rest = node.args[2:]
    mode = rest[0] if rest and isinstance(rest[0], str) else "constant"
    value = next((v for v in rest if isinstance(v, (int, float))), 0) or 0
    widths = list(node.args[1])  # type: ignore[arg-type]
    if mode != "constant" or value != 0 or len(widths) > 4 or min(widths) < 0:
        return None
    return widths + [0] * (4 - len(widths))


def _absorb_padding(node: fx.Node) -> bool:
    """Rule 4, on a qconv2d."""
    if op_name(node.target) != "edadm.qconv2d.default":
        return False
    codes = node.args[0]
    if not isinstance(codes, fx.Node) or codes.op != "call_function" or op_name(codes.target) != _QUANTIZE:
        return False
    widths = _zero_padding(codes.args[0])
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


def _share(node: fx.Node) -> bool:
    """Rule 5: an earlier equal quantizer of the same input takes over."""
    if op_name(node.target) != _QUANTIZE:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    same = [
        n
        for n in source.users
        if n is not node and n.target == node.target and n.users
        and _key(n) == _key(node)
    ]  # fmt: skip
    if not same:
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    first = min([node, *same], key=order.__getitem__)
    for other in [node, *same]:
        if other is not first:
            other.replace_all_uses_with(first)
    return True


def _key(node: fx.Node) -> tuple[Any, ...]:
    return tuple(a.target if isinstance(a, fx.Node) and a.op == "get_attr" else a for a in node.args)
