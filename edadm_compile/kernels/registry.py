"""The kernels a launch plan may name: argument order, grid, the reference in torch, the Triton function.

Nothing here needs Triton: a runtime loads cubins, and the CPU path runs the references.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from edadm_compile.kernels.launch import Launch

#: Module of each kernel; every one of them defines ``KERNEL``.
_MODULES = {
    name: f"edadm_compile.kernels.{name}"
    for name in (
        "qconv2d", "qlinear", "qconv2d_sm90", "qlinear_sm90", "groupnorm", "layernorm", "quantize", "attention",
        "attention_float",
    )
}  # fmt: skip

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Kernel:
    """One device kernel.

    The Triton function takes ``<role>_ptr`` for each role, then each scalar by name, then each constant and each
    tile size as ``tl.constexpr`` by name. A role that a launch does not use is passed as the constexpr None.

    Attributes:
        name: as in `Launch.kernel`.
        roles: operand roles in argument order.
        scalars: names of int32 arguments in argument order.
        constants: names compiled in, with the value used where a launch does not give one.
        sizes: names of the tile sizes.
        grid: programs in x, y, z from constants, scalars and tile sizes together.
        reference: computes the launch in torch on the CPU, in place: (tensors by role, constants and scalars by name).
        entry: "module:function" of the Triton function.
    """

    name: str
    roles: tuple[str, ...]
    scalars: tuple[str, ...]
    constants: Mapping[str, int | float | bool]
    sizes: tuple[str, ...]
    grid: Callable[[Values], tuple[int, int, int]]
    reference: Callable[[Mapping[str, Tensor], Values], None]
    entry: str

    def values(self, launch: Launch) -> dict[str, Any]:
        """Constants (defaults filled in), scalars and tile sizes of a launch by name.

        Raises:
            KeyError: the launch gives a constant, scalar or size the kernel does not have, or lacks one.
        """
        unknown = {*launch.constants} - {*self.constants} | {*launch.operands} - {*self.roles}
        if unknown or {*launch.scalars} != {*self.scalars} or {*launch.tile.sizes} != {*self.sizes}:
            raise KeyError(f"{self.name}: {sorted(unknown)} {sorted(launch.scalars)} {sorted(launch.tile.sizes)}")
        return {**self.constants, **launch.constants, **launch.scalars, **launch.tile.sizes}

    def function(self) -> Any:
        """The Triton function (imports Triton)."""
        module, _, name = self.entry.partition(":")
        return getattr(importlib.import_module(module), name)


@cache
def kernel(name: str) -> Kernel:
    """The kernel called `name`.

    Raises:
        KeyError: there is none.
    """
    found: Kernel = importlib.import_module(_MODULES[name]).KERNEL
    return found


def kernel_names() -> tuple[str, ...]:
    """All kernels."""
    return tuple(_MODULES)


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)
