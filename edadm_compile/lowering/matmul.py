"""Convolutions and linear layers: opening a group and emitting its launch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import layer_of
from edadm_compile.kernels import tiles
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.groups import MatmulGroup, activation_code
from edadm_compile.lowering.layout import ROW_ALIGNMENT, channels_last, contiguous, round_up, rows_of
from edadm_compile.quant import packing
from edadm_compile.quant.spec import act_spec

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
    from edadm_compile.lowering.planner import Codes16, Deferred

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
    upsampled = _upsampled(planner, source) is not None
    return op_name(node.target), tuple(node.meta["val"].shape), spatial, settings, kernel, upsampled


def _upsampled(planner: Planner, source: fx.Node) -> fx.Node | None:
    """The codes before a nearest 2x upsampling that the kernel can fold into its addressing."""
    from edadm_compile.lowering.planner import Deferred

    value = planner.values.get(source)
    if not isinstance(value, Deferred) or "upsample_nearest2d" not in op_name(value.node.target):
        return None
    inner = value.node.args[0]
    assert isinstance(inner, fx.Node)
    small, large = inner.meta["val"].shape, value.node.meta["val"].shape
    return inner if (large[2], large[3]) == (2 * small[2], 2 * small[3]) else None


@dataclass(frozen=True)
class _Segment:
    """One int8 product: its input in memory and its weights by name."""

    x: Operand
    upsample: int
    weights: tuple[str, ...]
    multipliers: tuple[str, ...]
    biases: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bits: int
    pad_value: int
    factor: int = 1


def _segments(planner: Planner, group: MatmulGroup) -> list[_Segment]:
    from edadm_compile.lowering.planner import Codes16

    if group.merged:
        return [_segment(planner, group.anchors, planner.operand(group.anchors[0].args[0]), 1)]
    found = []
    for anchor in group.anchors:
        source = anchor.args[0]
        assert isinstance(source, fx.Node)
        value = planner.values[source]
        if isinstance(value, Codes16):
            low = _segment(planner, [anchor], value.lo, 1)
            high = replace(_segment(planner, [anchor], value.hi, 1), biases=(), factor=256)
            hi, lo = divmod(low.pad_value + 128, 256)
            found += [replace(low, pad_value=lo - 128), replace(high, pad_value=hi)]
        else:
            inner = _upsampled(planner, source)
            found.append(_segment(planner, [anchor], planner.operand(inner or source), 2 if inner else 1))
    return found


def _segment(planner: Planner, anchors: list[fx.Node], x: Operand, upsample: int) -> _Segment:
    bits, shape = (9, 10) if op_name(anchors[0].target) == CONV else (4, 5)
    names = [[str(a.args[i].target) for a in anchors] for i in (1, 2, 3)]  # type: ignore[union-attr]
    pad = int(anchors[0].args[4]) if op_name(anchors[0].target) == CONV else 0  # type: ignore[arg-type]
    return _Segment(
        _aligned(planner, x, op_name(anchors[0].target)), upsample, tuple(names[0]), tuple(names[1]), tuple(names[2]),
        tuple(tuple(a.args[shape]) for a in anchors), packing.storage_bits(int(anchors[0].args[bits])), pad,  # type: ignore
    )  # fmt: skip


def _aligned(planner: Planner, x: Operand, kind: str) -> Operand:
    """Codes as the kernels read them: rows of adjacent channels, 16 bytes apart; copied by the library where they are not."""
    dim = 1 if kind == CONV else len(x.shape) - 1
    rows = rows_of(x, dim)
    if (
        rows is not None
        and rows.stride % ROW_ALIGNMENT == 0
        and x.offset % ROW_ALIGNMENT == 0
        and _whole_images(x, kind)
    ):
        return x
    stride = round_up(x.shape[dim], ROW_ALIGNMENT)
    strides = channels_last(x.shape, stride) if kind == CONV else (*(s * stride for s in contiguous(x.shape[:-1])), 1)
    copy = planner.build.buffer(x.shape, x.dtype, "aligned codes", strides)
    planner.emit_library("aten.clone.default", (x,), {}, copy, "codes are not in rows of adjacent channels: copied")
    return copy


def _whole_images(x: Operand, kind: str) -> bool:
    return kind != CONV or x.strides == channels_last(x.shape, x.strides[3]) or x.shape[0] == 1


def emit(planner: Planner, group: MatmulGroup) -> None:
    """Append the launch of a closed group, with the quantizer that follows it."""
    segments = _segments(planner, group)
    need_out, codes = planner.outputs_of(group) if not group.merged else (True, None)
    final = _is_output(planner, group)
    if codes is not None and group.base.shape[_channel_dim(group)] % ROW_ALIGNMENT and group.viewed:
        codes, need_out = None, True
    conv = op_name(group.anchors[0].target) == CONV
    kernel = "qconv2d" if conv and (final or not _is_rows(group, segments)) else "qlinear"
    constants = _shape_constants(group, segments, kernel)
    constants |= _fusion_constants(planner, group, kernel)
    channels = group.base.shape[_channel_dim(group)]
    operands: dict[str, Operand | None] = {"x": segments[0].x, "row": group.row, "residual": group.residual}
    writes = []
    if final:
        planner.values[group.tail] = operands["out"] = planner.result
        constants |= {"OUT_NCHW": True, "OUT_STRIDE": 0}
        writes.append("out")
    else:
        constants |= {"OUT": need_out, "OUT_STRIDE": channels if need_out else 0}
        if need_out:
            operands["out"] = group.base
            writes.append("out")
    if codes is not None:
        operands |= _codes_output(planner, group, codes, constants)
        writes.append("out_q")
    count = math.prod(group.base.shape) // channels
    scalars = {"pixels" if kernel == "qconv2d" else "rows": count}
    _finish(planner, group, kernel, segments, constants, scalars, operands, tuple(writes))


def _channel_dim(group: MatmulGroup) -> int:
    return 1 if op_name(group.anchors[0].target) == CONV else len(group.base.shape) - 1


def _is_output(planner: Planner, group: MatmulGroup) -> bool:
    """Whether the group writes the model's output and nothing else reads it."""
    users = list(group.tail.users)
    is_image = op_name(group.anchors[0].target) == CONV and not group.viewed
    return len(users) == 1 and users[0].op == "output" and is_image


def _is_rows(group: MatmulGroup, segments: list[_Segment]) -> bool:
    """Whether a convolution is 1x1 on every pixel: then rows are all there is."""
    args = group.anchors[0].args
    kernel, stride, padding = tuple(args[10][2:]), tuple(args[5]), tuple(args[6])  # type: ignore
    return kernel == (1, 1) and stride == (1, 1) and not any(padding) and segments[0].upsample == 1


def _shape_constants(group: MatmulGroup, segments: list[_Segment], kernel: str) -> dict[str, Any]:
    conv_input = op_name(group.anchors[0].target) == CONV
    strides = []
    for s in segments:
        rows = rows_of(s.x, 1 if conv_input else len(s.x.shape) - 1)
        assert rows is not None
        strides.append(max(rows.stride, round_up(rows.channels, ROW_ALIGNMENT)) if rows.rows == 1 else rows.stride)
    channels = group.base.shape[_channel_dim(group)]
    found: dict[str, Any] = {
        "C": segments[0].shapes[0][1],
        "X_STRIDE": strides[0],
        "O": channels,
        "BITS": segments[0].bits,
    }
    if len(segments) == 2:
        found |= {"SEGMENTS": 2, "C2": segments[1].shapes[0][1], "X2_STRIDE": strides[1], "BITS2": segments[1].bits}
    if kernel == "qconv2d":
        x, args = segments[0].x, group.anchors[0].args
        padding = list(args[6])  # type: ignore[arg-type]
        stride, dilation, shape = args[5], args[7], args[10]
        found |= {
            "H": x.shape[2], "W": x.shape[3], "KH": shape[2], "KW": shape[3], "STRIDE_H": stride[0], "STRIDE_W": stride[1],  # type: ignore
            "PAD_T": padding[0], "PAD_L": padding[2] if len(padding) == 4 else padding[1], "DIL_H": dilation[0], "DIL_W": dilation[1],  # type: ignore
            "UPSAMPLE": segments[0].upsample, "OH": group.base.shape[2], "OW": group.base.shape[3],
        }  # fmt: skip
    return found


def _fusion_constants(planner: Planner, group: MatmulGroup, kernel: str) -> dict[str, Any]:
    target = planner.build.target
    found: dict[str, Any] = {"EXACT": target.exact, "ASM": bool(target.arch), "ACT": group.act, "GLU": group.glu}
    if group.row is not None:
        found |= {"ROW": True, "ROW_STRIDE": group.row.strides[0]}
        if kernel == "qlinear":
            found["ROWS_PER_IMAGE"] = group.rows_per_image
    if group.residual is not None:
        found |= {"RESIDUAL": True, "RES_STRIDE": group.base.shape[_channel_dim(group)]}
    return found


def _codes_output(
    planner: Planner, group: MatmulGroup, codes: fx.Node, constants: dict[str, Any]
) -> dict[str, Operand | None]:
    """Operands for the codes a quantizer after the group asks for; records where they lie."""
    channels = group.base.shape[_channel_dim(group)]
    stride = round_up(channels, ROW_ALIGNMENT)
    if stride == channels:
        strides = group.out.strides
    elif _channel_dim(group) == 1:
        strides = channels_last(group.base.shape, stride)
    else:
        strides = (*(s * stride for s in contiguous(group.base.shape[:-1])), 1)
    out = planner.build.buffer(group.out.shape, torch.int8, codes.name, strides)
    planner.values[codes] = out
    constants |= {"OUT_Q": True, "OUT_Q_STRIDE": stride, **code_range(codes)}
    return {"out_q": out, "post": post_of(planner, codes)}


def code_range(codes: fx.Node) -> dict[str, int]:
    """QMIN and QMAX of a quantize node."""
    spec = act_spec(int(codes.args[3]), bool(codes.args[4]))  # type: ignore[arg-type]
    return {"QMIN": spec.qmin, "QMAX": spec.qmax}


def post_of(planner: Planner, codes: fx.Node) -> Operand:
    """Scale, zero point and 1/scale of a quantize node as the kernels read them."""
    names = [str(codes.args[i].target) for i in (1, 2)]  # type: ignore[union-attr]
    return planner.build.constant(names, "post", (3,), torch.float32)


def _finish(
    planner: Planner, group: MatmulGroup, kernel: str, segments: list[_Segment], constants: dict[str, Any],
    scalars: dict[str, int], operands: dict[str, Operand | None], writes: tuple[str, ...],
) -> None:  # fmt: skip
    """Choose the tile, then everything that depends on it: weight layout, workspace; append the launch."""
    build = planner.build
    tile = planner.build.tile(kernel, constants | scalars)
    block_m, block_n, block_k = (tile.sizes[f"BLOCK_{d}"] for d in "MNK")
    rows = round_up(constants["O"], block_m)
    # one weight for every tile of every batch, except that a gate starts where the values of this tile end
    stored = rows if group.glu else round_up(constants["O"], 128 if constants["O"] > 64 else 64)
    for i, segment in enumerate(segments):
        suffix = "2" if i else ""
        kc = round_up(segment.shapes[0][1], block_k)
        constants[f"KC{suffix}"] = kc
        taps = math.prod(segment.shapes[0][2:])
        both = stored * (2 if group.glu else 1)
        four = segment.bits == 4
        operands[f"w{suffix}"] = build.constant(
            segment.weights, "weight", (both, taps * kc // (2 if four else 1)), torch.uint8 if four else torch.int8,
            bits=segment.bits, shapes=[list(s) for s in segment.shapes], rows=stored if not group.glu else block_m, channels=kc, block=block_k, glu=group.glu,
        )  # fmt: skip
        operands[f"multiplier{suffix}"] = build.constant(
            segment.multipliers, "vector", (both,), torch.float32, length=stored, glu=group.glu, factor=segment.factor
        )
        operands[f"bias{suffix}"] = build.constant(
            segment.biases, "vector", (both,), torch.float32, length=stored, glu=group.glu, factor=1
        )
        if i:
            operands["x2"] = segment.x
        if kernel == "qconv2d":
            operands[f"pad{suffix}"] = build.constant(
                (), "codes", (kc,), torch.int8, value=segment.pad_value, length=kc
            )
    if tile.sizes["SPLIT_K"] > 1:
        accumulators = len(segments) * (2 if group.glu else 1)
        count = round_up(next(iter(scalars.values())), block_n)
        shape = (tile.sizes["SPLIT_K"], accumulators, rows, count)
        operands["partial"] = build.buffer(shape, torch.int32, f"{group.names[0]} partial sums")
        programs = (rows // block_m) * (count // block_n)
        operands["counter"] = Operand("counter", 0, torch.int32, (programs,), (1,))
        build.counters = max(build.counters, programs)
        writes = (*writes, "partial", "counter")
    if tiles.is_asynchronous(tile):
        kernel = f"{kernel}_sm90"
    build.launch(Launch(kernel, "+".join(group.names), present(operands), constants, scalars, tile, writes))
