"""Static memory plan: every buffer gets a place in one arena; buffers that are never alive together may share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edadm_compile.kernels.launch import ALIGNMENT, Buffer, Launch
from edadm_compile.lowering.layout import round_up


def lifetimes(
    launches: Sequence[Launch], sizes: Sequence[int], names: Sequence[str], conditioning: int
) -> list[Buffer]:
    """When each buffer is written first and read last; buffers nobody uses get size 0.

    What the first `conditioning` launches write and a later one reads stays alive for good: those launches do not run
    in every call.
    """
    first = [len(launches)] * len(sizes)
    last = [-1] * len(sizes)
    for i, launch in enumerate(launches):
        for operand in launch.operands.values():
            if operand.space == "arena":
                key = int(operand.key)
                first[key], last[key] = min(first[key], i), max(last[key], i)
    for key in range(len(sizes)):
        if first[key] < conditioning <= last[key]:
            first[key], last[key] = 0, len(launches)
    return [
        Buffer(size if end >= 0 else 0, begin if end >= 0 else 0, end, -1, name)
        for size, begin, end, name in zip(sizes, first, last, names, strict=True)
    ]


def plan(buffers: Sequence[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """Offsets for all buffers and the size of the arena: largest first, each at the lowest place that is free for it."""
    placed: list[Buffer] = []
    result = list(buffers)
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first, i)):
        buffer = buffers[index]
        if not buffer.size:
            result[index] = replace(buffer, offset=0)
            continue
        offset = 0
        for other in sorted(placed, key=lambda b: b.offset):
            if other.first > buffer.last or other.last < buffer.first:
                continue
            if offset + buffer.size <= other.offset:
                break
            offset = max(offset, round_up(other.offset + other.size, ALIGNMENT))
        result[index] = replace(buffer, offset=offset)
        placed.append(result[index])
    arena = max((b.offset + b.size for b in placed), default=0)
    return tuple(result), round_up(arena, ALIGNMENT)
