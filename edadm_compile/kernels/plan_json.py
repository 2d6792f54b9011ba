"""Launch plans as JSON, and their checks: a plan from a file can only name our kernels and memory that it owns."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.ops import FLOAT_OPS, LOWERED_OPS
from edadm_compile.kernels.constants import TRANSFORMS
from edadm_compile.kernels.launch import (
    ALIGNMENT,
    Buffer,
    ConstantSpec,
    Launch,
    LaunchPlan,
    Operand,
    Tile,
)
from edadm_compile.kernels.registry import kernel, kernel_names

_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
        torch.int64, torch.bool,
    )
}  # fmt: skip
_SPACES = ("arena", "constant", "input", "output", "counter")
#: No buffer, and no arena, of a plan that is meant to run anywhere is larger.
_LIMIT = 1 << 40


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_json(plan: LaunchPlan) -> str:
    """A plan as one line of JSON; equal plans give equal text."""
    value = {
        "arch": plan.arch, "batch": plan.batch, "store": _name(plan.store), "arena": plan.arena,
        "counters": plan.counters, "output": list(plan.output), "conditioning": plan.conditioning,
        "launches": [_launch_to(launch) for launch in plan.launches],
        "buffers": [[b.size, b.first, b.last, b.offset, b.name] for b in plan.buffers],
        "constants": {n: [list(c.source), c.transform, dict(c.arguments)] for n, c in sorted(plan.constants.items())},
        "inputs": [[name, list(shape), _name(dtype)] for name, (shape, dtype) in plan.inputs.items()],
        "tables": [[name, column, list(shape)] for name, (column, shape) in plan.tables.items()],
    }  # fmt: skip
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _launch_to(launch: Launch) -> dict[str, Any]:
    found = {
        "kernel": launch.kernel, "layer": launch.layer, "constants": dict(launch.constants),
        "scalars": dict(launch.scalars), "writes": list(launch.writes),
        "tile": [dict(launch.tile.sizes), launch.tile.num_warps, launch.tile.num_stages],
        "operands": {
            role: [o.space, o.key, _name(o.dtype), list(o.shape), list(o.strides), o.offset]
            for role, o in launch.operands.items()
        },
    }  # fmt: skip
    if launch.kernel == "torch":
        found |= {"why": launch.why_float, "call": launch.call}
    return found


def from_json(text: str) -> LaunchPlan:
    """The reverse of `to_json`, checked.

    Raises:
        ArtifactError: text that is no plan, an unknown kernel, operator or transform, or memory outside its buffer.
    """
    try:
        value = json.loads(text)
        plan = LaunchPlan(
            str(value["arch"]), _count(value["batch"]), _DTYPES[value["store"]],
            tuple(_launch_from(launch) for launch in value["launches"]),
            tuple(Buffer(_count(b[0]), int(b[1]), int(b[2]), _count(b[3]), str(b[4])) for b in value["buffers"]),
            _count(value["arena"]),
            {n: ConstantSpec(tuple(c[0]), str(c[1]), dict(c[2])) for n, c in value["constants"].items()},
            _count(value["counters"]),
            {n: (_shape(shape), _DTYPES[dtype]) for n, shape, dtype in value["inputs"]},
            _shape(value["output"]), _count(value["conditioning"]),
            {n: (_count(column), _shape(shape)) for n, column, shape in value["tables"]},
        )  # fmt: skip
        check(plan)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"launch plan: malformed ({type(error).__name__}: {str(error)[:200]})") from None
    return plan


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LIMIT:
        raise ValueError(f"got {value!r}, expected a count")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_count(n) for n in value)


def _launch_from(value: dict[str, Any]) -> Launch:
    sizes, warps, stages = value["tile"]
    operands = {
        role: Operand(o[0], o[1], _DTYPES[o[2]], _shape(o[3]), _shape(o[4]), _count(o[5]))
        for role, o in value["operands"].items()
    }
    return Launch(
        str(value["kernel"]), str(value["layer"]), operands, _numbers(value["constants"]), _numbers(value["scalars"]),
        Tile(_numbers(sizes), _count(warps), _count(stages)), tuple(value["writes"]), str(value.get("why", "")),
        value.get("call"),
    )  # fmt: skip


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(v, (int, float, bool)) for v in value.values()):
        raise ValueError("constants must be numbers")
    return dict(value)


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
    for name, spec in plan.constants.items():
        if spec.transform not in TRANSFORMS:
            raise ArtifactError(f"launch plan: constant {name} asks for an unknown transform {spec.transform!r}")
    if not 0 <= plan.conditioning <= len(plan.launches):
        raise ArtifactError("launch plan: more conditioning launches than launches")
    for launch in plan.launches:
        _check_launch(plan, launch)


def _check_launch(plan: LaunchPlan, launch: Launch) -> None:
    if launch.kernel == "torch":
        if launch.call[0] not in FLOAT_OPS and launch.call[0] not in LOWERED_OPS:
            raise ArtifactError(f"launch plan: {launch.layer}: unknown operator {launch.call[0]!r}")
    elif launch.kernel not in kernel_names():
        raise ArtifactError(f"launch plan: {launch.layer}: unknown kernel {launch.kernel!r}")
    else:
        kernel(launch.kernel).values(launch)
    for role, operand in launch.operands.items():
        if operand.space not in _SPACES or len(operand.shape) != len(operand.strides):
            raise ArtifactError(f"launch plan: {launch.layer}: {role} is malformed")
        room = _room(plan, operand)
        if room is not None and operand.span > room:
            raise ArtifactError(
                f"launch plan: {launch.layer}: {role} ends at byte {operand.span} of {operand.space} {operand.key}, "
                f"which has {room}"
            )


def _room(plan: LaunchPlan, operand: Operand) -> int | None:
    """Bytes behind an operand; None for constants, whose size their transform gives."""
    if operand.space == "arena":
        if type(operand.key) is not int or not 0 <= operand.key < len(plan.buffers):
            raise ArtifactError(f"launch plan: there is no buffer {operand.key!r}")
        return plan.buffers[operand.key].size
    if operand.space == "input":
        shape, dtype = plan.inputs[str(operand.key)]
        return math.prod(shape) * dtype.itemsize
    if operand.space == "output":
        return math.prod(plan.output) * 4
    if operand.space == "constant":
        if operand.key not in plan.constants:
            raise ArtifactError(f"launch plan: there is no constant {operand.key!r}")
        return None
    return plan.counters * 4
