"""Exact local rewrites around quantizers, shared by the lowering to kernels and the export to ONNX.

Each takes a node and returns whether it changed the graph; dead nodes are left to the caller.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from edadm_compile.ir.ops import op_name

QUANTIZE, DEQUANTIZE = "edadm.quantize.default", "edadm.dequantize.default"
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


def drop_identity(node: fx.Node) -> bool:
    """``x / 1``, ``x * 1``, alias, contiguous, dropout and a permutation that keeps the order → x."""
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


def quantize_first(node: fx.Node) -> bool:
    """``quantize(move(x))`` → ``move(quantize(x))`` for views, transposes and nearest upsampling."""
    if op_name(node.target) != QUANTIZE:
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


def zero_padding(node: Any) -> list[int] | None:
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


def share_quantizer(node: fx.Node) -> bool:
    """Two quantizers with one input, scale and width → one: an earlier equal quantizer of the same input takes over."""
    if op_name(node.target) != QUANTIZE:
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
