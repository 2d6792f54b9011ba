"""Activations and quantizers on their own, and the outputs that norms share with them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.codes import code_range, post_of
from edadm_compile.lowering.groups import Codes16, ElementGroup, Group, activation_code
from edadm_compile.lowering.layout import (
    ROW_ALIGNMENT,
    channels_last,
    collapse,
    contiguous,
    round_up,
    rows_of,
)
from edadm_compile.quant.spec import act_spec

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def stores(
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
    writes = stores(planner, group, codes, need_out, constants, operands, constants["C"])
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
