"""Storage layout of integer weights. No other module knows it.

A weight of logical shape [O, I, kh, kw] (linear: [O, I]) is stored as a matrix [O, K] with K contiguous and
ordered (kh, kw, I): the order in which a channels-last kernel walks it. int8 stores one code per byte.
int4 pads K to a multiple of 32 with zero codes; byte j of a 32-code block holds code j in its low nibble and
code j + 16 in its high nibble, so that the two nibbles of 16 consecutive bytes are two contiguous runs of K and
a kernel needs no shuffle after unpacking (kernel tiles are multiples of 32 in K).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Codes per int4 block; a tile of any kernel is a multiple of it.
INT4_BLOCK = 32
_HALF = INT4_BLOCK // 2


def storage_bits(bits: int) -> int:
    """Bits a code occupies on disk and in the kernel: 4 up to 4-bit codes, else 8."""
    return 4 if bits <= 4 else 8


def to_matrix(codes: Tensor) -> Tensor:
    """[O, I, kh, kw] or [O, I] codes to [O, K] with K ordered (kh, kw, I)."""
    if codes.dim() == 4:
        codes = codes.permute(0, 2, 3, 1)
    return codes.reshape(codes.shape[0], -1).contiguous()


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `to_matrix` for the logical `shape`."""
    if len(shape) == 4:
        o, i, kh, kw = shape
        return matrix.reshape(o, kh, kw, i).permute(0, 3, 1, 2).contiguous()
    return matrix.reshape(tuple(shape))


def packed_columns(k: int, bits: int) -> int:
    """Bytes per row of a packed matrix with `k` codes per row."""
    if storage_bits(bits) == 8:
        return k
    return -(-k // INT4_BLOCK) * _HALF


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes.

    Args:
        codes: int8 of logical shape [O, I, kh, kw] or [O, I], each within `bits` signed bits.
        bits: code width.

    Returns:
        int8 [O, K] when a code takes a byte, uint8 [O, ceil(K / 32) * 16] when it takes a nibble.
    """
    matrix = to_matrix(codes)
    if storage_bits(bits) == 8:
        return matrix
    o, k = matrix.shape
    blocks = -(-k // INT4_BLOCK)
    padded = matrix.new_zeros(o, blocks * INT4_BLOCK)
    padded[:, :k] = matrix
    nibbles = (padded.to(torch.uint8) & 0xF).reshape(o, blocks, 2, _HALF)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(o, blocks * _HALF).contiguous()


def unpack_matrix(packed: Tensor, bits: int, k: int) -> Tensor:
    """int8 [O, k] codes of a packed weight, in storage order."""
    if storage_bits(bits) == 8:
        return packed
    o = packed.shape[0]
    blocks = packed.reshape(o, -1, _HALF)
    if packed.is_meta:  # for the shape alone: arithmetic without memory imports torch's compiler, for a second
        return packed.new_empty((o, 2 * packed.shape[1]), dtype=torch.int8)[:, :k].contiguous()
    nibbles = torch.stack((blocks & 0xF, blocks >> 4), dim=2).reshape(o, -1)[:, :k]
    return ((nibbles.to(torch.int8) ^ 8) - 8).contiguous()  # sign-extend 4 bits


def unpack(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack`: int8 codes of the logical `shape`."""
    k = 1
    for size in shape[1:]:
        k *= size
    return from_matrix(unpack_matrix(packed, bits, k), shape)
