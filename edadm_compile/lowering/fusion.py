"""Taking what follows an open group into it.

1. conv(a) + conv(b) of the same geometry → two segments of one launch, each with its own scale
2. group + row of one value per image and channel → row
3. group + value of the same shape → residual
4. activation(group) → activation of the epilogue
5. v * gelu(g) with v, g the halves of a linear's output → gated epilogue
The quantizer after a group is taken in when the group is emitted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.launch import Operand
from edadm_compile.lowering import matmul
from edadm_compile.lowering.groups import Group, MatmulGroup, NormGroup, activation_code
from edadm_compile.lowering.layout import contiguous

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

_ADD = ("aten.add.Tensor",)
_HALVES = ("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")


def absorb(planner: Planner, node: fx.Node) -> bool:
    """Take `node` into an open group if a rule matches."""
    name = op_name(node.target)
    value = node.meta["val"]
    if isinstance(value, Tensor) and value.dtype != torch.float32:
        return False  # the model computes in a type of its own here, the kernels in float32
    if name in _ADD and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args[:2]):
        a, b = node.args[:2]
        pairs = sorted(((a, b), (b, a)), key=lambda p: -_age(planner, p[0]))  # the group opened last stays open
        return any(_two_sources(planner, node, *p) for p in pairs) or any(
            _row(planner, node, *p) or _residual(planner, node, *p) for p in pairs
        )
    if activation_code(node):
        return _activation(planner, node)
    return name in _HALVES and _gate(planner, node)


def _age(planner: Planner, node: Any) -> int:
    value = planner.values.get(node)
    return int(value.key) if isinstance(value, Operand) and value.space == "arena" else -1


def sole_group(planner: Planner, value: Any, reader: fx.Node) -> Group | None:
    """The open group behind a value (through views) that nobody but `reader` reads."""
    operand = planner.values.get(value)
    if not isinstance(operand, Operand) or operand.space != "arena":
        return None
    group = planner.open.get(operand.key)
    node = value
    while group is not None and node is not group.tail:
        if len(node.users) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
        if planner.values.get(node) is None:
            return None
    if group is None or len(group.tail.users) != 1 or set(value.users) != {reader}:
        return None
    return group


def _take(planner: Planner, group: Group, node: fx.Node, out: Operand) -> bool:
    group.tail, group.out = node, out
    planner.values[node] = out
    return True


def _two_sources(planner: Planner, node: fx.Node, a: Any, b: Any) -> bool:
    first, second = (sole_group(planner, v, node) for v in (a, b))
    if not isinstance(first, MatmulGroup) or not isinstance(second, MatmulGroup) or first is second:
        return False
    fits = (
        first.bare and second.bare
        and len(first.anchors) == len(second.anchors) == 1
        and matmul.segments_of(planner, first.anchors[0]) == matmul.segments_of(planner, second.anchors[0]) == 1
        and matmul.geometry(planner, first.anchors[0]) == matmul.geometry(planner, second.anchors[0])
        and first.tail is a and second.tail is b
    )  # fmt: skip
    if not fits:
        return False
    planner.open.pop(second.out.key)
    first.anchors += second.anchors
    first.names += second.names
    return _take(planner, first, node, first.out)


def _row(planner: Planner, node: fx.Node, a: Any, b: Any) -> bool:
    group = sole_group(planner, a, node)
    if not isinstance(group, MatmulGroup) or group.merged or group.glu or group.act or group.row or group.residual:
        return False
    if group.tail is not a or not _is_row(node.meta["val"], b.meta["val"], op_name(group.anchors[0].target)):
        return False
    value = planner.operand(b)
    channel = 1 if "conv" in op_name(group.anchors[0].target) else node.meta["val"].dim() - 1
    pad = node.meta["val"].dim() - len(value.shape)
    shape, strides = (1,) * pad + value.shape, (0,) * pad + value.strides
    images = node.meta["val"].shape[0] if shape[0] > 1 and channel > 0 else 1
    if strides[channel] != 1 and shape[channel] != 1:
        return False
    group.row = replace(value, shape=(images, shape[channel]), strides=(strides[0] if images > 1 else 0, 1))
    group.rows_per_image = node.meta["val"].numel() // shape[channel] // node.meta["val"].shape[0]
    return _take(planner, group, node, group.out)


def _is_row(total: Tensor, row: Tensor, kind: str) -> bool:
    """Whether `row` broadcasts over the pixels or tokens of `total`."""
    if not row.dtype.is_floating_point or row.dim() > total.dim() or row.dim() == 0:
        return False
    shape = (1,) * (total.dim() - row.dim()) + tuple(row.shape)
    channel = 1 if "conv" in kind else total.dim() - 1
    if shape[channel] != total.shape[channel] or tuple(shape) == tuple(total.shape):
        return False
    return all(n == 1 for d, n in enumerate(shape) if d not in (0, channel)) and shape[0] in (1, total.shape[0])


def _residual(planner: Planner, node: fx.Node, a: Any, b: Any) -> bool:
    group = sole_group(planner, a, node)
    if not isinstance(group, MatmulGroup) or group.merged or group.glu or group.act or group.residual:
        return False
    if b.meta["val"].shape != a.meta["val"].shape or not b.meta["val"].dtype.is_floating_point:
        return False
    value, out = planner.operand(b), planner.values[a]
    if out.offset or not _aligned_like(value, out):
        return False
    group.residual = replace(value, shape=group.base.shape, strides=group.base.strides)
    return _take(planner, group, node, replace(out, shape=tuple(node.meta["val"].shape)))


def _aligned_like(value: Operand, out: Operand) -> bool:
    return all(n == 1 or s == t for n, s, t in zip(out.shape, value.strides, out.strides, strict=True))


def _activation(planner: Planner, node: fx.Node) -> bool:
    group = sole_group(planner, node.args[0], node)
    if group is None or group.act or group.tail is not node.args[0]:
        return False
    code = activation_code(node)
    if isinstance(group, MatmulGroup):
        if group.merged or group.glu:
            return False
    elif not isinstance(group, NormGroup) or code != 1 or "group" not in op_name(group.node.target):
        return False
    group.act = code
    return _take(planner, group, node, group.out)


def _gate(planner: Planner, node: fx.Node) -> bool:
    """Rule 5, on the operator that halves the channels."""
    group = sole_group(planner, node.args[0], node)
    if (
        not isinstance(group, MatmulGroup)
        or not group.bare
        or len(group.anchors) != 1
        or group.tail is not node.args[0]
    ):
        return False
    if "linear" not in op_name(group.anchors[0].target) or len(node.meta["val"]) != 2:
        return False
    halves = node.meta["val"]
    if halves[0].shape != halves[1].shape or halves[0].shape[:-1] != group.tail.meta["val"].shape[:-1]:
        return False
    items = {u.args[1]: u for u in node.users}
    if set(items) != {0, 1} or any(len(i.users) != 1 for i in items.values()):
        return False
    gate = next(iter(items[1].users))
    product = next(iter(items[0].users))
    if activation_code(gate) != 2 or set(gate.users) != {product} or op_name(product.target) != "aten.mul.Tensor":
        return False
    if matmul.segments_of(planner, group.anchors[0]) != 1:
        return False
    for inner in (node, *items.values(), gate):
        planner.values[inner] = None
    planner.open.pop(group.out.key)
    shape = tuple(product.meta["val"].shape)
    group.glu = True
    group.out = group.base = planner.build.buffer(shape, planner.build.target.store, product.name, contiguous(shape))
    group.tail = product
    planner.hold(group)
    return True
