"""Whether a launch plan stays in its memory.

Every buffer in the arena, every pointer in a buffer, every kernel's reach behind its pointer. Constants are checked where
their sizes are known (`check_constants`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.ops import FLOAT_OPS, LOWERED_OPS
from edadm_compile.kernels import library
from edadm_compile.kernels.constants import TRANSFORMS
from edadm_compile.kernels.footprint import reach
from edadm_compile.kernels.launch import ALIGNMENT, TIME_TABLES, Buffer, Launch, LaunchPlan, Operand
from edadm_compile.kernels.registry import kernel, kernel_names
from edadm_compile.kernels.targets import GRID_LIMIT

_SPACES = ("arena", "constant", "input", "output", "counter")
#: Bytes behind a constant that may be read (`edadm_compile.kernels.memory`).
SLACK = 512


def check(plan: LaunchPlan) -> None:
    """Refuse plans that reach outside of their memory or name what is not ours.

    Raises:
        ArtifactError: says which launch or buffer.
    """
    for i, buffer in enumerate(plan.buffers):
        if buffer.offset % ALIGNMENT or buffer.offset + buffer.size > plan.arena:
            raise ArtifactError(
                f"launch plan: buffer {i} of {buffer.size} bytes at {buffer.offset} is outside the arena"
            )
    _check_sharing(plan.buffers)
    _check_tables(plan)
    for name, spec in plan.constants.items():
        if spec.transform not in TRANSFORMS:
            raise ArtifactError(f"launch plan: constant {name} asks for an unknown transform {spec.transform!r}")
    if not 0 <= plan.conditioning <= len(plan.launches):
        raise ArtifactError("launch plan: more conditioning launches than launches")
    for index, launch in enumerate(plan.launches):
        try:
            _check_launch(plan, launch, index)
        except ArtifactError as error:
            raise ArtifactError(f"launch plan: launch {index} ({launch.layer}): {error}") from None


def _check_sharing(buffers: tuple[Buffer, ...]) -> None:
    """No two buffers that are alive at the same time share a byte."""
    alive: list[tuple[int, Buffer]] = []
    for i, buffer in sorted(enumerate(buffers), key=lambda pair: pair[1].first):
        if not buffer.size:
            continue
        alive = [(j, other) for j, other in alive if other.last >= buffer.first]
        for j, other in alive:
            if buffer.offset < other.offset + other.size and other.offset < buffer.offset + buffer.size:
                raise ArtifactError(f"launch plan: buffers {j} and {i} are alive together and overlap")
        alive.append((i, buffer))


def _check_tables(plan: LaunchPlan) -> None:
    """The columns of every time table lie in the input that holds them."""
    shape, dtype = plan.inputs.get(TIME_TABLES, ((0, 0), torch.float32))
    for name, (column, row) in plan.tables.items():
        if len(shape) != 2 or dtype != torch.float32 or column + math.prod(row) > shape[1]:
            raise ArtifactError(f"launch plan: time table {name} is outside of the input {TIME_TABLES!r}")


def _check_launch(plan: LaunchPlan, launch: Launch, index: int) -> None:
    for role, operand in launch.operands.items():
        _check_operand(plan, role, operand, index)
    if any(role not in launch.operands for role in launch.writes):
        raise ArtifactError(f"it writes {launch.writes}, its operands are {sorted(launch.operands)}")
    if launch.kernel == "torch":
        _check_library(launch)
        return
    if launch.kernel not in kernel_names():
        raise ArtifactError(f"unknown kernel {launch.kernel!r}")
    found = reach(launch)
    if set(found) - set(launch.operands):
        raise ArtifactError(f"{launch.kernel} needs {sorted(found)}, the operands are {sorted(launch.operands)}")
    grid = kernel(launch.kernel).grid(kernel(launch.kernel).values(launch))
    if any(not 1 <= n <= limit for n, limit in zip(grid, GRID_LIMIT, strict=True)):
        raise ArtifactError(f"{launch.kernel} needs a grid of {grid}, allowed 1 to {GRID_LIMIT}")
    for role, touched in found.items():
        operand = launch.operands[role]
        if operand.dtype not in touched.types:
            raise ArtifactError(f"{role} is {operand.dtype}, {launch.kernel} takes {touched.types}")
        end, room = (operand.offset + touched.elements) * operand.dtype.itemsize, _room(plan, operand)
        if room is not None and end > room:
            raise ArtifactError(
                f"{launch.kernel} reaches byte {end} of {operand.space} {operand.key} through {role}, which has {room}"
            )


def _check_operand(plan: LaunchPlan, role: str, operand: Operand, index: int) -> None:
    if operand.space not in _SPACES or len(operand.shape) != len(operand.strides):
        raise ArtifactError(f"{role} is malformed")
    room = _room(plan, operand)
    if room is not None and operand.span > room:
        raise ArtifactError(f"{role} ends at byte {operand.span} of {operand.space} {operand.key}, which has {room}")
    if operand.space == "arena":
        buffer = plan.buffers[int(operand.key)]
        if not buffer.first <= index <= buffer.last:
            raise ArtifactError(f"{role} is buffer {operand.key}, alive from {buffer.first} to {buffer.last}")
        if buffer.size % operand.dtype.itemsize:
            raise ArtifactError(f"{role} is {operand.dtype} in a buffer of {buffer.size} bytes")
    expected = {"output": torch.float32, "counter": torch.int32}.get(operand.space)
    if operand.space == "input":
        expected = plan.inputs[str(operand.key)][1]
    if expected is not None and operand.dtype != expected:
        raise ArtifactError(f"{role} is {operand.dtype} in {operand.space} {operand.key} of {expected}")


def _room(plan: LaunchPlan, operand: Operand) -> int | None:
    """Bytes behind an operand; None for constants, whose size their transform gives."""
    if operand.space == "arena":
        if type(operand.key) is not int or not 0 <= operand.key < len(plan.buffers):
            raise ArtifactError(f"there is no buffer {operand.key!r}")
        return plan.buffers[operand.key].size
    if operand.space == "input":
        if operand.key not in plan.inputs:
            raise ArtifactError(f"there is no input {operand.key!r}")
        shape, dtype = plan.inputs[str(operand.key)]
        return math.prod(shape) * dtype.itemsize
    if operand.space == "output":
        return math.prod(plan.output) * 4
    if operand.space == "constant":
        if operand.key not in plan.constants:
            raise ArtifactError(f"there is no constant {operand.key!r}")
        return None
    return plan.counters * 4


def check_constants(plan: LaunchPlan, made: Mapping[str, Tensor]) -> None:
    """The reach of every launch into constants.

    Args:
        made: constants by name; only their sizes and types count (meta tensors will do).

    Raises:
        ArtifactError: a constant that is too small, or of another type.
    """
    for index, launch in enumerate(plan.launches):
        found = {} if launch.kernel == "torch" else reach(launch)
        for role, operand in launch.operands.items():
            if operand.space != "constant":
                continue
            constant = made[str(operand.key)]
            size = constant.numel() * constant.element_size()
            touched = found[role].elements if role in found else 0
            end = max(operand.span, (operand.offset + touched) * operand.dtype.itemsize)
            if operand.dtype != constant.dtype or operand.span > size or end > size + SLACK:
                raise ArtifactError(
                    f"launch plan: launch {index} ({launch.layer}): {role} reaches byte {end} of constant {operand.key}, "
                    f"{size} bytes of {constant.dtype}"
                )


def _check_library(launch: Launch) -> None:
    call = launch.call
    if not isinstance(call, list) or len(call) != 3 or not isinstance(call[1], list) or not isinstance(call[2], dict):
        raise ArtifactError("a library call is no operator with arguments")
    if not isinstance(call[0], str) or (call[0] not in FLOAT_OPS and call[0] not in LOWERED_OPS):
        raise ArtifactError(f"unknown operator {str(call[0])[:80]!r}")
    if "out" not in launch.operands or tuple(launch.writes) != ("out",):
        raise ArtifactError("a library call has one output, 'out'")
    for value in _tables_in([call[1], call[2]]):
        known = ("role", launch.operands), ("dtype", library.DTYPES), ("float", ("inf", "-inf", "nan"))
        if not any(set(value) == {key} and isinstance(value[key], str) and value[key] in names for key, names in known):
            raise ArtifactError(f"argument {str(value)[:60]!r} of a library call is not understood")


def _tables_in(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    if depth > 8:
        raise ArtifactError("arguments nested too deeply")
    if isinstance(value, dict) and depth > 1:
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tables_in(item, depth + 1)


class _Bounded(TorchDispatchMode):
    """Refuses every result, intermediate ones too, of more than `allowed` bytes."""

    def __init__(self, allowed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allowed = allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at what it made."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.numel() * value.element_size() > self._allowed:
                raise ArtifactError(f"a value of {value.numel() * value.element_size()} bytes, allowed {self._allowed}")
        return result


def check_library_shapes(plan: LaunchPlan, allowed: int) -> None:
    """Run every library launch on tensors without memory.

    Args:
        allowed: bytes of one intermediate value.

    Raises:
        ArtifactError: a call that does not accept its operands, or whose result is not of the shape of its output.
    """
    for index, launch in enumerate(plan.launches):
        if launch.kernel != "torch":
            continue
        views = {
            role: torch.empty(o.span // o.dtype.itemsize, dtype=o.dtype, device="meta").as_strided(o.shape, o.strides, o.offset)
            for role, o in launch.operands.items()
        }  # fmt: skip
        try:
            with torch.no_grad(), _Bounded(allowed):
                library.run(launch, views)
        except Exception as error:  # a kernel's refusal may be of any type
            reason = (str(error).splitlines() or [""])[0][:200]
            raise ArtifactError(
                f"launch plan: launch {index} ({launch.layer}): {launch.call[0]} cannot run: {reason}"
            ) from error
