"""Convolutions and linear layers: opening a group for them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import layer_of
from edadm_compile.kernels.launch import Operand
from edadm_compile.lowering.groups import Codes16, Deferred, MatmulGroup, activation_code
from edadm_compile.lowering.layout import channels_last, contiguous

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

CONV, LINEAR = "edadm.qconv2d.default", "edadm.qlinear.default"
_FREE = ("aten.view.default", "aten.reshape.default", "aten.transpose.int", "aten.unsqueeze.default", "aten.permute.default",
         "aten.unflatten.int", "aten._unsafe_view.default")  # fmt: skip


def start(planner: Planner, node: fx.Node) -> bool:
    """Open a group for a layer; False for layers without an integer kernel."""
    name = op_name(node.target)
    if name not in (CONV, LINEAR) or (name == CONV and node.args[8] != 1):
        return False
    if not segments_of(planner, node):
        return False
    anchors = [node]
    if name == LINEAR:
        anchors = _siblings(planner, node)
    value = node.meta["val"]
    shape = (*value.shape[:-1], sum(a.meta["val"].shape[-1] for a in anchors)) if name == LINEAR else tuple(value.shape)
    strides = channels_last(shape) if name == CONV else contiguous(shape)
    out = planner.build.buffer(shape, planner.build.target.store, node.name, strides)
    names = [info.name if (info := layer_of(a)) else a.name for a in anchors]
    group = MatmulGroup(node, out, out, 0, names, anchors, len(anchors) > 1)
    planner.hold(group)
    if group.merged:
        offset = 0
        for anchor in anchors:
            part = tuple(anchor.meta["val"].shape)
            planner.values[anchor] = replace(out, shape=part, offset=offset)
            offset += part[-1]
    return True


def _siblings(planner: Planner, node: fx.Node) -> list[fx.Node]:
    """Linears on the same codes whose results are read as they are: one launch with their weights stacked."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    found = [
        n
        for n in source.users
        if n.op == "call_function" and op_name(n.target) == LINEAR and n.args[0] is source and n.args[4] == node.args[4]
        and n not in planner.values and _read_plainly(n)
    ]  # fmt: skip
    return found if node in found and len(found) > 1 and segments_of(planner, node) == 1 else [node]


def _read_plainly(node: fx.Node) -> bool:
    """Whether nothing after a linear would rather be fused into its epilogue."""
    for user in node.users:
        if user.op == "call_function" and op_name(user.target) in _FREE:
            if not _read_plainly(user):
                return False
            continue
        name = op_name(user.target) if user.op == "call_function" else user.op
        if activation_code(user) or name in ("edadm.quantize.default", "aten.chunk.default", "aten.split.Tensor"):
            return False
        if name == "aten.add.Tensor" and user.meta["val"].shape == node.meta["val"].shape:
            return False
    return True


def segments_of(planner: Planner, node: fx.Node) -> int:
    """int8 products a layer takes: 2 for 16-bit codes, 0 if its input is in no form the kernels read."""
    value = planner.values.get(node.args[0])
    if isinstance(value, Codes16):
        return 2
    return 1 if isinstance(value, (Operand, Deferred)) else 0


def geometry(planner: Planner, node: fx.Node) -> tuple[Any, ...]:
    """What two layers must share to be two segments of one launch."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    spatial = (
        tuple(source.meta["val"].shape[2:]) if op_name(node.target) == CONV else tuple(source.meta["val"].shape[:-1])
    )
    settings = tuple(map(tuple, node.args[5:8])) if op_name(node.target) == CONV else ()  # type: ignore[arg-type]
    kernel = tuple(node.args[10][2:]) if op_name(node.target) == CONV else ()  # type: ignore
    folded = upsampled(planner, source) is not None
    return op_name(node.target), tuple(node.meta["val"].shape), spatial, settings, kernel, folded


def upsampled(planner: Planner, source: fx.Node) -> fx.Node | None:
    """The codes before a nearest 2x upsampling that the kernel can fold into its addressing."""
    value = planner.values.get(source)
    if not isinstance(value, Deferred) or "upsample_nearest2d" not in op_name(value.node.target):
        return None
    inner = value.node.args[0]
    assert isinstance(inner, fx.Node)
    small, large = inner.meta["val"].shape, value.node.meta["val"].shape
    return inner if (large[2], large[3]) == (2 * small[2], 2 * small[3]) else None
