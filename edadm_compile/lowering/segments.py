"""The int8 products of a matrix launch: where their inputs lie, and their weights by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.launch import Operand
from edadm_compile.lowering.groups import Codes16, MatmulGroup
from edadm_compile.lowering.layout import ROW_ALIGNMENT, channels_last, contiguous, round_up, rows_of
from edadm_compile.lowering.matmul import CONV, upsampled
from edadm_compile.quant import packing

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner


@dataclass(frozen=True)
class Segment:
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


def find(planner: Planner, group: MatmulGroup) -> list[Segment]:
    """The products of a group in the order the kernel runs them; emits open groups that make their inputs."""
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
            inner = upsampled(planner, source)
            found.append(_segment(planner, [anchor], planner.operand(inner or source), 2 if inner else 1))
    return found


def _segment(planner: Planner, anchors: list[fx.Node], x: Operand, upsample: int) -> Segment:
    bits, shape = (9, 10) if op_name(anchors[0].target) == CONV else (4, 5)
    names = [[str(a.args[i].target) for a in anchors] for i in (1, 2, 3)]  # type: ignore[union-attr]
    pad = int(anchors[0].args[4]) if op_name(anchors[0].target) == CONV else 0  # type: ignore[arg-type]
    return Segment(
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
