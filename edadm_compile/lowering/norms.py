"""Norms, activations and quantizers: everything element by element that is not a matrix product's epilogue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.groups import ElementGroup, Group, NormGroup, activation_code
from edadm_compile.lowering.layout import (
    ROW_ALIGNMENT,
    Rows,
    as_pixels,
    channels_last,
    collapse,
    contiguous,
    images_of,
    round_up,
    rows_of,
)
from edadm_compile.lowering.matmul import code_range, post_of
from edadm_compile.quant.spec import act_spec

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


# ----------------------------------------------------------------------- norms
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
    from edadm_compile.lowering.planner import Deferred

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
    writes = _stores(planner, group, codes, need_out, constants, operands, channels)
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


def _stores(
    planner: Planner, group: Group, codes: fx.Node | None, need_out: bool, constants: dict[str, Any],
    operands: dict[str, Operand | None], channels: int,
) -> tuple[str, ...]:  # fmt: skip
    """Output operands of a norm or activation launch; records where the codes lie."""
    constants |= {"OUT": need_out, "OUT_STRIDE": channels if need_out else 0, "OUT_Q": codes is not None}
    writes = []
    if need_out:
        operands["out"] = group.base
        writes.append("out")
    if codes is not None:
        stride = round_up(channels, ROW_ALIGNMENT)
        image = group.base.strides == channels_last(group.base.shape) and len(group.base.shape) > 2
        shape = group.base.shape
        strides = channels_last(shape, stride) if image else (*(s * stride for s in contiguous(shape[:-1])), 1)
        out = planner.build.buffer(shape, torch.int8, codes.name, strides)
        planner.values[codes] = operands["out_q"] = out
        operands["post"] = post_of(planner, codes)
        constants |= {"OUT_Q_STRIDE": stride, **code_range(codes)}
        writes.append("out_q")
    return tuple(writes)


# -------------------------------------------------------- activations, quantizers
def start_element(planner: Planner, node: fx.Node) -> bool:
    """Open a group for an activation on a value in memory."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = planner.operand(source)
    if _as_images(value) is None or value.dtype not in _FLOATS or node.meta["val"].dtype != torch.float32:
        return False
    shape = tuple(node.meta["val"].shape)
    image = len(shape) > 2 and value.strides[1] == 1
    out = planner.build.buffer(
        shape, planner.build.target.store, node.name, channels_last(shape) if image else contiguous(shape)
    )
    planner.hold(ElementGroup(node, out, out, activation_code(node), [node.name], source))
    return True


def emit_element(planner: Planner, group: ElementGroup) -> None:
    """Append the launch of an activation, with the quantizer after it."""
    need_out, codes = planner.outputs_of(group)
    _element(planner, group, planner.operand(group.source), codes, need_out)


def emit_quantize(planner: Planner, node: fx.Node) -> bool:
    """Append a quantizer of a value in memory; False if no kernel reads its layout."""
    from edadm_compile.lowering.planner import Codes16

    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = planner.operand(source)
    bits = int(node.args[3])  # type: ignore[arg-type]
    if value.dtype not in _FLOATS or _as_images(value) is None:
        return _flat_quantize(planner, node, value) if bits <= 8 else False
    group = Group(node, value, replace(value, strides=_output_strides(value)), 0, [f"quantize {source.name}"])
    if bits <= 8:
        _element(planner, group, value, node, False)
        return True
    shape = tuple(value.shape)
    stride = round_up(shape[_channel(value)], ROW_ALIGNMENT)
    strides = (
        channels_last(shape, stride) if _channel(value) == 1 else (*(s * stride for s in contiguous(shape[:-1])), 1)
    )
    hi, lo = (planner.build.buffer(shape, torch.int8, f"{node.name} {part}", strides) for part in ("hi", "lo"))
    planner.values[node] = Codes16(hi, lo)
    spec = act_spec(bits, bool(node.args[4]))
    constants = _element_constants(planner, value, 0) | {
        "TERMS": 2, "OUT": False, "OUT_Q": True, "OUT_Q_STRIDE": stride, "QMIN": spec.qmin, "QMAX": spec.qmax,
    }  # fmt: skip
    operands = {"x": value, "post": post_of(planner, node), "out_q": hi, "out_q_lo": lo}
    _launch(planner, group.names[0], operands, constants, value, ("out_q", "out_q_lo"))
    return True


def _channel(value: Operand) -> int:
    """Dimension of the channels: 1 of images (ours are channels-last, the model's input is not), the last of rows."""
    image = len(value.shape) > 2 and (value.strides[1] == 1 or (value.space == "input" and len(value.shape) == 4))
    return 1 if image else len(value.shape) - 1


def _output_strides(value: Operand) -> tuple[int, ...]:
    return channels_last(value.shape) if _channel(value) == 1 else contiguous(value.shape)


def _as_images(value: Operand) -> tuple[int, int, int, int, int, int] | None:
    """(batch, elements between images, pixels, between pixels, channels, between channels), or None."""
    channel = _channel(value)
    if channel == 1 and len(value.shape) >= 3:
        pixels = collapse(value.shape[2:], value.strides[2:])
        if pixels is None:
            return None
        return value.shape[0], value.strides[0], pixels[0], pixels[1], value.shape[1], value.strides[1]
    rows = rows_of(value, channel)
    return None if rows is None else (1, 0, rows.rows, rows.stride, rows.channels, 1)


def _flat_quantize(planner: Planner, node: fx.Node, value: Operand) -> bool:
    """Codes of a dense value of any order of dimensions, in the same order."""
    order = sorted(range(len(value.shape)), key=lambda d: -value.strides[d])
    shape, strides = [value.shape[d] for d in order], [value.strides[d] for d in order]
    found = collapse(shape, strides)
    if value.dtype not in _FLOATS or found is None or found[1] != 1 or found[0] % ROW_ALIGNMENT:
        return False
    inner = shape[-1]
    flat = replace(value, shape=(found[0] // inner, inner), strides=(inner, 1))
    out = planner.build.buffer(value.shape, torch.int8, node.name, value.strides)
    constants = _element_constants(planner, flat, 0) | {
        "OUT": False, "OUT_Q": True, "OUT_Q_STRIDE": inner, **code_range(node),
    }  # fmt: skip
    operands = {"x": flat, "post": post_of(planner, node), "out_q": out}
    _launch(planner, f"quantize {node.args[0]}", operands, constants, flat, ("out_q",))
    planner.values[node] = out
    return True


def _element_constants(planner: Planner, value: Operand, act: int) -> dict[str, Any]:
    found = _as_images(value)
    assert found is not None
    _, image, pixels, pixel, channels, channel = found
    target = planner.build.target
    return {
        "HW": pixels, "C": channels, "X_BATCH": image, "X_PIXEL": pixel, "X_CHANNEL": channel, "ACT": act,
        "EXACT": target.exact, "ASM": bool(target.arch),
    }  # fmt: skip


def _element(planner: Planner, group: Group, value: Operand, codes: fx.Node | None, need_out: bool) -> None:
    constants = _element_constants(planner, value, group.act)
    operands: dict[str, Operand | None] = {"x": value}
    writes = _stores(planner, group, codes, need_out, constants, operands, constants["C"])
    _launch(planner, group.names[0], present(operands), constants, value, writes)


def _launch(
    planner: Planner, name: str, operands: dict[str, Operand], constants: dict[str, Any], value: Operand,
    writes: tuple[str, ...],
) -> None:  # fmt: skip
    found = _as_images(value)
    assert found is not None
    scalars = {"batch": found[0]}
    batch, image, pixels, pixel, channels, channel = found
    operands["x"] = replace(value, shape=(batch, pixels, channels), strides=(image, pixel, channel))
    for role in ("out", "out_q", "out_q_lo"):
        if role in operands:
            stride = int(constants["OUT_STRIDE" if role == "out" else "OUT_Q_STRIDE"])
            shape = (batch, pixels, channels)
            operands[role] = replace(operands[role], shape=shape, strides=(pixels * stride, stride, 1))
    tile = planner.build.tile("quantize", constants | scalars)
    planner.build.launch(Launch("quantize", name, operands, constants, scalars, tile, writes))
