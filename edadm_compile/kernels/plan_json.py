"""Launch plans as JSON, and their checks: a plan from a file can only name our kernels and memory that it owns."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels.launch import Buffer, ConstantSpec, Launch, LaunchPlan, Operand, Tile
from edadm_compile.kernels.library import DTYPES
from edadm_compile.kernels.plan_check import check

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
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"launch plan: malformed ({str(error)[:200]})") from None
    return from_value(value)


def from_value(value: Any) -> LaunchPlan:
    """As `from_json`, of parsed text."""
    try:
        plan = LaunchPlan(
            _text(value["arch"]), _count(value["batch"]), DTYPES[value["store"]],
            tuple(_launch_from(launch) for launch in value["launches"]),
            tuple(_buffer_from(*b) for b in value["buffers"]),
            _count(value["arena"]),
            {n: ConstantSpec(tuple(map(_text, s)), _text(t), dict(a)) for n, (s, t, a) in value["constants"].items()},
            _count(value["counters"]),
            {_text(n): (_shape(shape), DTYPES[dtype]) for n, shape, dtype in value["inputs"]},
            _shape(value["output"]), _count(value["conditioning"]),
            {_text(n): (_count(column), _shape(shape)) for n, column, shape in value["tables"]},
        )  # fmt: skip
        check(plan)
    except ArtifactError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ArtifactError(f"launch plan: malformed ({type(error).__name__}: {str(error)[:200]})") from None
    return plan


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LIMIT:
        raise ValueError(f"got {value!r}, expected a count")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    shape = tuple(_count(n) for n in value)
    if len(shape) > 16 or math.prod(shape) > _LIMIT:
        raise ValueError(f"got {str(value)[:80]}, expected a shape")
    return shape


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"got {str(value)[:80]}, expected a text")
    return value


def _buffer_from(size: Any, first: Any, last: Any, offset: Any, name: Any) -> Buffer:
    return Buffer(_count(size), _count(first), _count(last + 1) - 1, _count(offset), _text(name))


def _launch_from(value: dict[str, Any]) -> Launch:
    sizes, warps, stages = value["tile"]
    operands = {
        role: Operand(_text(space), _key(key), DTYPES[kind], _shape(shape), tuple(map(_count, strides)), _count(offset))
        for role, (space, key, kind, shape, strides, offset) in value["operands"].items()
    }
    return Launch(
        _text(value["kernel"]), _text(value["layer"]), operands, _numbers(value["constants"]), _numbers(value["scalars"]),
        Tile(_numbers(sizes), _count(warps), _count(stages)), tuple(map(_text, value["writes"])), _text(value.get("why", "")),
        value.get("call"),
    )  # fmt: skip


def _key(value: Any) -> int | str:
    return value if isinstance(value, str) else _count(value)


def _numbers(value: dict[str, Any]) -> dict[str, Any]:
    if not all(isinstance(v, (int, float, bool)) for v in value.values()):
        raise ValueError("constants must be numbers")
    return dict(value)
