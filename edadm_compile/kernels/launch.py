"""A launch plan: what a device does for one step, as data.

A plan belongs to one architecture and one batch size. It is a list of launches in order; each names a kernel of
`edadm_compile.kernels.registry`, its operands, its constants and its tile. The CUDA engine executes it from cubins,
`edadm_compile.kernels.execute` on the CPU from reference kernels or under the Triton interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

#: A value compiled into a kernel.
Constant = int | float | bool

#: Name of the input that holds this step's rows of all time tables, float32 [B, values].
TIME_TABLES = "time tables"

#: Bytes every buffer starts at a multiple of (vector loads and tensor maps need 128).
ALIGNMENT = 256


@dataclass(frozen=True)
class Operand:
    """One tensor argument: a strided view into memory that exists before the first launch.

    Attributes:
        space: "arena" (planned intermediate), "constant" (weights, scales), "input" (graph input, also table rows),
            "output" (the result), "counter" (zeroed once, left zero by every kernel).
        key: index of the arena buffer, or name of the constant or input; 0 for the output and the counters.
        dtype: element type.
        shape: sizes.
        strides: elements between neighbours, as torch strides.
        offset: elements from the start of the buffer.
    """

    space: str
    key: int | str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def span(self) -> int:
        """Bytes from the start of the buffer to the end of the last element."""
        if 0 in self.shape:
            return self.offset * self.dtype.itemsize
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class Tile:
    """Blocking of one launch.

    Attributes:
        sizes: tile constants of the kernel (BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, ...).
        num_warps: warps per program.
        num_stages: depth of the load pipeline.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Launch:
    """One kernel call.

    Attributes:
        kernel: name in the registry, or "torch" for a library operator.
        layer: what it computes, for people: layer names joined by "+".
        operands: by role; a role that is absent is not used by this launch.
        constants: shapes and flags compiled into the kernel, by the kernel's constant names.
        scalars: int32 values passed at launch (what depends on the batch).
        tile: blocking.
        writes: roles that are written, the others are read.
        why_float: for "torch": why no integer or fused kernel runs.
        call: for "torch": operator and its arguments (see `edadm_compile.kernels.library`).
    """

    kernel: str
    layer: str
    operands: Mapping[str, Operand]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    scalars: Mapping[str, int] = field(default_factory=dict)
    tile: Tile = field(default_factory=Tile)
    writes: tuple[str, ...] = ("out",)
    why_float: str = ""
    call: Any = None


@dataclass(frozen=True)
class Buffer:
    """One arena buffer.

    Attributes:
        size: bytes.
        first, last: indices of the launches between which it is alive, inclusive.
        offset: bytes from the start of the arena; -1 until memory is planned.
        name: the graph value it holds, for people.
    """

    size: int
    first: int
    last: int
    offset: int = -1
    name: str = ""


@dataclass(frozen=True)
class ConstantSpec:
    """How a device constant is made from a tensor of the program.

    Attributes:
        source: names of the program's tensors, joined in order.
        transform: name in `edadm_compile.kernels.constants`.
        arguments: of the transform.
    """

    source: tuple[str, ...]
    transform: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LaunchPlan:
    """Everything an engine does for one call at one batch size.

    Attributes:
        arch: "sm_80" and so on; "" for a plan that only the CPU executes.
        batch: batch size of every shape in it.
        store: element type of intermediates that are not codes: float16, bfloat16 or float32.
        launches: in order; the first `conditioning` of them depend on the conditions alone.
        buffers: of the arena.
        arena: bytes.
        constants: by name.
        counters: int32 counters that must be zero before the first launch.
        inputs: graph inputs by name: shape and type.
        output: shape of the float32 result.
        conditioning: how many launches need to run only when a condition changes.
        tables: time tables by graph input: (first column, shape of a row) in the input that holds all of them.
    """

    arch: str
    batch: int
    store: torch.dtype
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    arena: int
    constants: Mapping[str, ConstantSpec]
    counters: int
    inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    output: tuple[int, ...]
    conditioning: int = 0
    tables: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
