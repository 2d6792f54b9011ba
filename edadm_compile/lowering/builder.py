"""Collects launches, arena buffers and device constants while a plan is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from edadm_compile.kernels import tiles
from edadm_compile.kernels.launch import ConstantSpec, Launch, Operand, Tile
from edadm_compile.lowering.layout import contiguous


@dataclass(frozen=True)
class Target:
    """What a plan is made for.

    Attributes:
        arch: "sm_90" and so on; "" for execution on the CPU only.
        batch: batch size.
        store: element type of intermediates that are not codes.
        exact: IEEE division and exact activations, for bit comparisons.
        tiles: measured tiles by shape, before the built-in choice (see `edadm_compile.kernels.tiles`).
        library_attention: torch computes attention instead of the fused kernel.
        float_layers: layers that run in the store type because that was measured faster.
    """

    arch: str
    batch: int
    store: torch.dtype = torch.float16
    exact: bool = False
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    library_attention: bool = False
    float_layers: tuple[str, ...] = ()


@dataclass
class Builder:
    """The growing plan.

    Attributes:
        target: what it is for.
        launches: so far, in order.
        sizes, names: bytes and labels of the arena buffers by index.
        constants: by name.
        counters: int32 counters needed.
    """

    target: Target
    launches: list[Launch] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    constants: dict[str, ConstantSpec] = field(default_factory=dict)
    counters: int = 0

    def buffer(
        self, shape: Sequence[int], dtype: torch.dtype, name: str, strides: Sequence[int] | None = None
    ) -> Operand:
        """A new arena buffer seen through `shape` and `strides`; kernels may read up to 512 bytes past its end."""
        strides = tuple(strides) if strides is not None else contiguous(shape)
        operand = Operand("arena", len(self.sizes), dtype, tuple(shape), strides)
        self.sizes.append(operand.span + 512)
        self.names.append(name)
        return operand

    def constant(
        self, source: Sequence[str], transform: str, shape: Sequence[int], element: torch.dtype, /, **arguments: Any
    ) -> Operand:
        """A device constant made from tensors of the program; equal requests are one constant."""
        spec = ConstantSpec(tuple(source), transform, arguments)
        text = json.dumps([spec.source, transform, arguments], sort_keys=True, default=str)
        name = f"{transform}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.constants[name] = spec
        return Operand("constant", name, element, tuple(shape), contiguous(shape))

    def parameter(self, target: str, shape: Sequence[int], dtype: torch.dtype) -> Operand:
        """A tensor of the program as it is, in the given type."""
        return self.constant((target,), "cast", shape, dtype, dtype=str(dtype).removeprefix("torch."))

    def tile(self, kernel: str, values: Mapping[str, Any]) -> Tile:
        """The tile of a launch with these constants and scalars."""
        return tiles.choose(kernel, values, self.target.arch, self.target.tiles)

    def launch(self, launch: Launch) -> None:
        """Append a launch."""
        self.launches.append(launch)


def present(operands: Mapping[str, Operand | None]) -> dict[str, Operand]:
    """Operands without the absent ones."""
    return {role: operand for role, operand in operands.items() if operand is not None}
