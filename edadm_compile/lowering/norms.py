"""Group norms and layer norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.elements import stores
from edadm_compile.lowering.groups import Deferred, NormGroup
from edadm_compile.lowering.layout import (
    Rows,
    as_pixels,
    channels_last,
    contiguous,
    images_of,
    rows_of,
)

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def start(planner: Planner, node: fx.Node) -> bool:
    """Open a group for a group norm or layer norm over adjacent channels."""
    name = op_name(node.target)
    shape = tuple(node.meta["val"].shape) if isinstance(node.meta["val"], torch.Tensor) else ()
    if shape and node.meta["val"].dtype != torch.float32:
        return False
    parameters = [a for a in node.args[2:4] if a is not None]
    if node.kwargs or not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in parameters):
        return False
    if name == "aten.group_norm.default" and len(parameters) == 2:
        sources = _group_norm_sources(planner, node)
        strides = channels_last(shape)
    elif name == "aten.layer_norm.default" and list(node.args[1]) == [shape[-1]]:  # type: ignore[arg-type]
        sources, strides = [node.args[0]], contiguous(shape)
    else:
        return False
    if not sources or not all(_fits(planner, s, name) for s in sources):
        return False
    out = planner.build.buffer(shape, planner.build.target.store, node.name, strides)
    planner.hold(NormGroup(node, out, out, 0, [node.name], node, sources))
    return True


def _group_norm_sources(planner: Planner, node: fx.Node) -> list[Any]:
    """What a group norm reads: its input, or the two parts of a concatenation that is then never written."""
    value = planner.values.get(node.args[0])
    if not isinstance(value, Deferred):
        return [node.args[0]]
    if op_name(value.node.target) == "aten.cat.default":
        parts, dim = value.node.args[0], value.node.args[1] if len(value.node.args) > 1 else 0
        if dim == 1 and len(parts) == 2:  # type: ignore[arg-type]
            return list(parts)  # type: ignore[arg-type]
    planner.operand(node.args[0])
    return [node.args[0]]


def _fits(planner: Planner, source: fx.Node, name: str) -> bool:
    value = planner.values.get(source)
    if not isinstance(value, Operand) or value.dtype not in _FLOATS:
        return False
    if "layer" in name:
        return rows_of(value, len(value.shape) - 1) is not None
    found = images_of(value, 1) if len(value.shape) > 1 else None
    return found is not None and (found[0] == 1 or found[1] == found[2].rows * found[2].stride)


def emit(planner: Planner, group: NormGroup) -> None:
    """Append the launch of a norm group."""
    sources = [planner.operand(s) for s in group.sources]
    is_group_norm = "group_norm" in op_name(group.node.target)
    args = list(group.node.args) + [None] * 4
    weight, bias, eps = args[2:5]
    eps = 1e-5 if eps is None else eps
    channels = group.base.shape[1 if is_group_norm else -1]
    operands: dict[str, Operand | None] = {"x": sources[0]}
    for role, node in (("weight", weight), ("bias", bias)):
        if node is not None:
            operands[role] = planner.build.parameter(str(node.target), (channels,), torch.float32)
    constants: dict[str, Any] = {"EPS": eps, "EXACT": planner.build.target.exact}
    if is_group_norm:
        kernel, scalars = "groupnorm", {"batch": group.base.shape[0]}
        constants |= _group_norm_constants(planner, group, sources, args[1])
        if len(sources) == 2:
            operands["x2"] = sources[1]
    else:
        rows = rows_of(sources[0], len(sources[0].shape) - 1)
        assert rows is not None
        kernel, scalars = "layernorm", {"rows": rows.rows}
        constants |= {
            "C": channels,
            "X_STRIDE": rows.stride,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
        }
    need_out, codes = planner.outputs_of(group)
    writes = stores(planner, group, codes, need_out, constants, operands, channels)
    tile = planner.build.tile(kernel, constants | scalars)
    for role in ("x", "x2", "out", "out_q"):
        if operands.get(role) is not None:
            operands[role] = as_pixels(operands[role])  # type: ignore[arg-type]
    planner.build.launch(Launch(kernel, "+".join(group.names), present(operands), constants, scalars, tile, writes))


def _group_norm_constants(planner: Planner, group: NormGroup, sources: list[Operand], groups: int) -> dict[str, Any]:
    rows = [images_of(s, 1)[2] for s in sources]  # type: ignore[index]
    second = rows[1] if len(rows) == 2 else Rows(0, 0, 0)
    return {
        "HW": rows[0].rows, "C": rows[0].channels, "C2": second.channels, "X_STRIDE": rows[0].stride,
        "X2_STRIDE": second.stride, "GROUPS": groups, "ACT": group.act, "ASM": bool(planner.build.target.arch),
    }  # fmt: skip
