"""How a model is called, and its time tables, as JSON and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import InputSpec, Signature, TimeTables, get_constant, placeholders
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.program_json import DTYPES, graph_from_json, graph_to_json, is_name
from edadm_compile.runtime.program_shapes import run_meta

_PATH_DIALECT = "float"
_INPUT = {"name", "shape", "dtype", "role", "num_classes", "required"}
_SIGNATURE = {"inputs", "output", "max_batch", "min_batch", "source"}
_TIME = {"tables", "path", "path_outputs", "folded"}
_MOST_BATCH, _MOST_CLASSES, _MOST_INPUTS = 1 << 20, 1 << 31, 64
#: Elements of one input per sample.
_MOST_ELEMENTS = 1 << 28


def signature_to_json(signature: Signature) -> dict[str, Any]:
    """Plain values."""
    inputs = [
        {**vars(s), "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape)} for s in signature.inputs
    ]
    return {**vars(signature), "inputs": inputs}


def signature_from_json(value: Any) -> Signature:
    """The reverse of `signature_to_json`.

    Raises:
        ArtifactError: anything that it would not have written.
    """
    if not isinstance(value, dict) or set(value) != _SIGNATURE or not isinstance(value["inputs"], list):
        raise ArtifactError("signature: malformed")
    inputs = tuple(_input(item) for item in value["inputs"][: _MOST_INPUTS + 1])
    roles = [s.role for s in inputs]
    if roles[:2] != ["x", "t"] or set(roles[2:]) - {"cond"} or len(inputs) > _MOST_INPUTS:
        raise ArtifactError("signature: the inputs are not x, t and conditions")
    if len({s.name for s in inputs}) != len(inputs) or inputs[1].shape or not inputs[0].shape:
        raise ArtifactError("signature: two inputs of one name, or timesteps of more than one number")
    batches, output = (value["min_batch"], value["max_batch"]), value["output"]
    known = isinstance(output, str) and output in ("tensor", "sample") and isinstance(value["source"], str)
    if any(type(b) is not int for b in batches) or not 1 <= batches[0] <= batches[1] <= _MOST_BATCH or not known:
        raise ArtifactError(f"signature: batches {batches} or output {str(output)[:40]!r} are not understood")
    return Signature(inputs, output, batches[1], batches[0], value["source"])


def _input(value: Any) -> InputSpec:
    if not isinstance(value, dict) or set(value) != _INPUT:
        raise ArtifactError("signature: malformed input")
    name, shape, classes = value["name"], value["shape"], value["num_classes"]
    if not isinstance(name, str) or len(name) > 256 or not is_name(name):
        raise ArtifactError(f"signature: {str(name)[:80]!r} is no name of an input")
    sizes = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and n >= 1 for n in shape)
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if not sizes or math.prod(shape) > _MOST_ELEMENTS or dtype is None:
        raise ArtifactError(f"signature: absurd size or type of input {name}")
    counted = classes is None or (type(classes) is int and 1 <= classes <= _MOST_CLASSES)
    if not counted or type(value["required"]) is not bool or not isinstance(value["role"], str):
        raise ArtifactError(f"signature: input {name} is malformed")
    return InputSpec(name, tuple(shape), dtype, value["role"], classes, value["required"])


def collect(module: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
    """Add the constants of a graph to `tensors`."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensors[str(node.target)] = get_constant(module, str(node.target))


def time_to_json(time: TimeTables, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Plain values; keys, tables and the path's constants go to `tensors`."""
    tensors["time.keys"] = time.keys
    tensors.update({f"time.tables.{name}": table for name, table in time.tables.items()})
    path = None
    if time.path is not None:
        collect(time.path, tensors)
        path = graph_to_json(time.path.graph, [])
    return {
        "tables": sorted(time.tables),
        "path": path,
        "path_outputs": list(time.path_outputs),
        "folded": list(time.folded),
    }


def time_from_json(
    value: Any, tensors: Callable[[str], Tensor], signature: Signature, limits: Limits
) -> TimeTables | None:
    """The reverse of `time_to_json`.

    Raises:
        ArtifactError: keys that do not ascend, tables without a row for each, or a path that computes something else.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != _TIME:
        raise ArtifactError("time tables: malformed")
    names, outputs, folded = (_names(value[key], key) for key in ("tables", "path_outputs", "folded"))
    if len(set(names)) != len(names) or len(set(outputs)) != len(outputs) or not set(outputs) <= set(names):
        raise ArtifactError("time tables: names appear twice, or the path computes what is no table")
    tables = {name: tensors(f"time.tables.{name}") for name in names}
    keys = tensors("time.keys").double()
    if keys.dim() != 1 or not keys.numel() or any(t.dim() < 1 or t.shape[0] != keys.numel() for t in tables.values()):
        raise ArtifactError("time tables: rows and keys disagree")
    if not bool(keys.isfinite().all()) or not bool((keys[1:] > keys[:-1]).all()):
        raise ArtifactError("time tables: the keys do not ascend")
    if any(table.dtype != torch.float32 for table in tables.values()):
        raise ArtifactError("time tables: expected float32 rows")
    path = None if value["path"] is None else graph_from_json(value["path"], tensors, _PATH_DIALECT)
    time = TimeTables(keys, tables, path, outputs, folded)
    if path is not None:
        _check_path(path, time, signature, limits)
    elif outputs and not bool((keys == keys.round()).all() & (keys.abs() < 1 << 31).all()):
        raise ArtifactError("time tables: the keys of a complete table are no integers")
    return time


def _names(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ArtifactError(f"time tables: {key} is no list of names")
    return tuple(value)


def _check_path(path: fx.GraphModule, time: TimeTables, signature: Signature, limits: Limits) -> None:
    """The path must compute rows of its tables (nothing is executed: shapes only)."""
    if len(placeholders(path.graph)) != 1:
        raise ArtifactError("time path: expected one input")
    t = torch.empty(signature.min_batch, dtype=signature.inputs[1].dtype, device="meta")
    outputs = run_meta(path, [t], limits)
    wanted = [(signature.min_batch, *time.tables[name].shape[1:]) for name in time.path_outputs]
    listed = isinstance(outputs, (list, tuple)) and all(isinstance(o, Tensor) for o in outputs)
    if not listed or [tuple(o.shape) for o in outputs] != wanted:
        raise ArtifactError("time path: its outputs are not rows of its tables")
