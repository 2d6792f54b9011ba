"""Where values lie in memory: activations are channels-last, views are free, and torch computes the strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Operand

#: Code rows start at a multiple of this many bytes, so that every load is a full vector.
ROW_ALIGNMENT = 16


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def channels_last(shape: Sequence[int], channels: int | None = None) -> tuple[int, ...]:
    """Strides of [B, C, ...] stored as [B, ..., C], pixels `channels` (default C) elements apart."""
    c = channels or shape[1]
    inner = [s * c for s in contiguous(shape[2:])]
    return (math.prod(shape[2:]) * c, 1, *inner)


def view_like(operand: Operand, value: Tensor) -> Operand:
    """The operand that `value`, a view made by `as_meta`, stands for."""
    return replace(operand, shape=tuple(value.shape), strides=value.stride(), offset=int(value.storage_offset()))


def as_meta(operand: Operand) -> Tensor:
    """A tensor without memory that has the strides of `operand`."""
    base = torch.empty(operand.span // operand.dtype.itemsize, dtype=operand.dtype, device="meta")
    return base.as_strided(operand.shape, operand.strides, operand.offset)


def view(operand: Operand, function: Callable[[Tensor], Any]) -> Any:
    """`function` applied to an operand if it only makes views: operands in the same structure; None if it would copy."""
    source = as_meta(operand)
    storage = source.untyped_storage()._cdata

    def convert(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            items = [convert(v) for v in value]
            return None if None in items else tuple(items)
        return view_like(operand, value) if value.untyped_storage()._cdata == storage else None

    return convert(function(source))


@dataclass(frozen=True)
class Rows:
    """A value seen as a matrix [rows, channels], channels adjacent.

    Attributes:
        rows, channels: sizes.
        stride: elements from one row to the next.
    """

    rows: int
    channels: int
    stride: int


def collapse(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """(size, stride) of dimensions that can be walked with one stride, or None."""
    sizes = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    if not sizes:
        return 1, 0
    for (_, outer), (n, inner) in pairwise(sizes):
        if outer != n * inner:
            return None
    return math.prod(n for n, _ in sizes), sizes[-1][1]


def rows_of(operand: Operand, channel_dim: int) -> Rows | None:
    """An operand as rows of its channels, or None where the memory is not laid out so."""
    shape, strides = list(operand.shape), list(operand.strides)
    c, c_stride = shape.pop(channel_dim), strides.pop(channel_dim)
    if c_stride != 1 and c != 1:
        return None
    found = collapse(shape, strides)
    if found is None:
        return None
    rows, stride = found
    return Rows(rows, c, stride if rows > 1 else max(stride, c))


def images_of(operand: Operand, channel_dim: int) -> tuple[int, int, Rows] | None:
    """An operand as (batch, elements between images, rows of one image); None where that does not fit."""
    inner = replace(operand, shape=operand.shape[1:], strides=operand.strides[1:])
    rows = rows_of(inner, channel_dim - 1)
    return None if rows is None else (operand.shape[0], operand.strides[0], rows)


def as_pixels(operand: Operand) -> Operand:
    """Images [B, C, ...] or rows [..., C] as the norm kernels describe them: [B, pixels, C], or [rows, C]."""
    if len(operand.shape) > 2 and operand.strides[1] == 1:
        found = images_of(operand, 1)
        assert found is not None
        batch, image, rows = found
        return replace(operand, shape=(batch, rows.rows, rows.channels), strides=(image, rows.stride, 1))
    flat = rows_of(operand, len(operand.shape) - 1)
    assert flat is not None
    return replace(operand, shape=(flat.rows, flat.channels), strides=(flat.stride, 1))
