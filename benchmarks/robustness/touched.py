"""The addresses a kernel uses, from the kernel itself: its Triton source under Triton's interpreter, without memory.

Every pointer is given an address of its own, far from the others; loads give zeros, stores are dropped, and what is kept
is how far from each pointer they reach. Needs a process that was started with ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from edadm_compile.kernels.launch import Launch
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.request import _TYPES

#: Address of the first pointer; the next ones follow this far apart.
_APART = 1 << 44
#: More steps than this are not interpreted.
_MOST_STEPS = 400


class TooLong(Exception):
    """A launch whose interpretation would take minutes."""


def touched(launch: Launch, corners: bool = True) -> dict[str, tuple[int, int]]:
    """First and last + 1 byte that a launch touches behind each pointer, relative to it.

    Args:
        corners: interpret the programs at both ends of each axis of the grid only (they reach furthest), not all.

    Raises:
        TooLong: more steps than are worth waiting for.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    found = kernel(launch.kernel)
    values = {**found.values(launch), "OVERLAP": False, "ASM": False}
    if _steps(values) > _MOST_STEPS:
        raise TooLong
    grid = found.grid(values)
    roles = [role for role in found.roles if role in launch.operands]
    arguments: dict[str, Any] = {f"{role}_ptr": None for role in found.roles}
    for number, role in enumerate(roles, 1):
        kind = tl.str_to_ty(f"*{_TYPES[launch.operands[role].dtype]}", None)
        handle = interpreter.TensorHandle(np.array([number * _APART], dtype=np.uint64), kind)
        arguments[f"{role}_ptr"] = tl.tensor(handle, kind)
    arguments |= {name: interpreter._implicit_cvt(values[name]) for name in found.scalars}
    arguments |= {name: values[name] for name in (*found.constants, *found.sizes)}
    reach: dict[int, tuple[int, int]] = {}
    body = found.function().rewrite()
    with _recording(interpreter, reach, values.get("SPLIT_K", 1)), np.errstate(all="ignore"):
        scope = interpreter._patch_lang(body)
        try:
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for index in _programs(grid, corners):
                interpreter.interpreter_builder.set_grid_idx(*index)
                body(**arguments)
        finally:
            scope.restore()
    return {role: reach[number] for number, role in enumerate(roles, 1) if number in reach}


def _steps(values: Mapping[str, Any]) -> int:
    """Iterations of a program's loops."""
    if "KC" in values:
        taps = values.get("KH", 1) * values.get("KW", 1)
        return int(taps * (values["KC"] + values["KC2"] * (values["SEGMENTS"] - 1)) // values["BLOCK_K"])
    if "LK" in values:
        return int(values["LK"] // values["BLOCK_KV"]) + values["BLOCK_Q"] * values["BLOCK_KV"] // 4096
    if "GROUPS" in values:
        parts = values["T"] + values["T2"] + values["BLOCK_G"]
        return int(
            values["STEPS"] + values["HW"] // values["BLOCK_P"] + parts + values["BLOCK_P"] * values["BLOCK_C"] // 4096
        )
    return int(max(values.get("BLOCK_R", 1), values.get("BLOCK_P", 1)) * values["BLOCK_C"] // 4096)


def _programs(grid: tuple[int, int, int], corners: bool) -> Iterator[tuple[int, ...]]:
    axes = [sorted({0, n // 2, n - 1}) if corners else list(range(n)) for n in grid]
    return itertools.product(*axes)


@contextmanager
def _recording(interpreter: Any, reach: dict[int, tuple[int, int]], splits: int) -> Iterator[None]:
    """Replace what reads and writes memory in Triton's interpreter."""
    builder = interpreter.interpreter_builder

    def note(pointers: Any, mask: Any) -> None:
        data = np.atleast_1d(pointers.data)
        where = np.broadcast_to(np.ones(1, dtype=bool) if mask is None else mask.data, data.shape).astype(bool)
        if not where.any():
            return
        size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        addresses = data[where].astype(np.int64)
        owners = (
            addresses + _APART // 2
        ) // _APART  # an offset may be negative; a load may choose between two pointers
        for number in np.unique(owners).tolist():
            offsets = addresses[owners == number] - number * _APART
            low, high = int(offsets.min()), int(offsets.max()) + size
            old = reach.get(number, (low, high))
            reach[number] = (min(old[0], low), max(old[1], high))

    def load(pointers: Any, mask: Any, other: Any, cache: Any, volatile: Any) -> Any:
        note(pointers, mask)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(np.shape(pointers.data), interpreter._get_np_dtype(kind)), kind)

    def store(pointers: Any, value: Any, mask: Any, cache: Any) -> None:
        note(pointers, mask)

    def rmw(operation: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
        note(pointers, mask)  # every program is the last one: it adds up the partial sums
        return interpreter.TensorHandle(np.full_like(value.data, splits - 1), value.dtype.scalar)

    replaced = {"create_masked_load": load, "create_masked_store": store, "create_atomic_rmw": rmw}
    for name, function in replaced.items():
        setattr(builder, name, function)
    try:
        yield
    finally:
        for name in replaced:
            delattr(builder, name)
