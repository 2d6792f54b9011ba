"""Emitting the launch of a matrix group: constants, operands, tile, and what depends on the tile."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels import tiles
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.codes import code_range, post_of
from edadm_compile.lowering.groups import MatmulGroup
from edadm_compile.lowering.layout import ROW_ALIGNMENT, channels_last, contiguous, round_up, rows_of
from edadm_compile.lowering.matmul import CONV
from edadm_compile.lowering.segments import Segment, find

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner


def emit(planner: Planner, group: MatmulGroup) -> None:
    """Append the launch of a closed group, with the quantizer that follows it."""
    segments = find(planner, group)
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


def _is_rows(group: MatmulGroup, segments: list[Segment]) -> bool:
    """Whether a convolution is 1x1 on every pixel: then rows are all there is."""
    args = group.anchors[0].args
    kernel, stride, padding = tuple(args[10][2:]), tuple(args[5]), tuple(args[6])  # type: ignore
    return kernel == (1, 1) and stride == (1, 1) and not any(padding) and segments[0].upsample == 1


def _shape_constants(group: MatmulGroup, segments: list[Segment], kernel: str) -> dict[str, Any]:
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


def _finish(
    planner: Planner, group: MatmulGroup, kernel: str, segments: list[Segment], constants: dict[str, Any],
    scalars: dict[str, int], operands: dict[str, Operand | None], writes: tuple[str, ...],
) -> None:  # fmt: skip
    """Choose the tile, then everything that depends on it: weight layout, workspace; append the launch."""
    build = planner.build
    tile = planner.build.tile(kernel, constants | scalars)
    block_m, block_n, block_k = (tile.sizes[f"BLOCK_{d}"] for d in "MNK")
    rows = round_up(constants["O"], block_m)
    # one weight for every tile of every batch, except that a gate starts where the values of this tile end
    stored = rows if group.glu else tiles.stored_rows(constants["O"])
    for i, segment in enumerate(segments):
        suffix = "2" if i else ""
        kc = round_up(segment.shapes[0][1], block_k)
        constants[f"KC{suffix}"] = kc
        taps = math.prod(segment.shapes[0][2:])
        both = stored * (2 if group.glu else 1)
        four = segment.bits == 4
        operands[f"w{suffix}"] = build.constant(
            segment.weights, "weight", (both, taps * kc // (2 if four else 1)), torch.uint8 if four else torch.int8,
            bits=segment.bits, shapes=[list(s) for s in segment.shapes], rows=stored if not group.glu else block_m, channels=kc, block=block_k if four else 0, glu=group.glu,
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
