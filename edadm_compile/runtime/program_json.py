"""A graph as JSON and back, through the closed table of operators.

A node is ``[kind, target, args]``, then ``kwargs`` and the index of its layer record where there are any. Kinds are
"p" (input), "a" (constant), "f" (operator) and "o" (output). An argument is a plain value, a list, ``"%12"`` for the
value of node 12, or an object with one key: ``{"str": "%text"}``, ``{"dtype": "float32"}``, ``{"float": "inf"}``,
``{"memory_format": "contiguous_format"}``, ``{"slice": [start, stop, step]}``.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.dialects import LEGAL
from edadm_compile.ir.ops import op_name, resolve
from edadm_compile.ir.program import LayerInfo, layer_of, set_constant

#: Bounds on what a file may ask for; far above any real UNet.
MAX_NODES = 100_000
MAX_DEPTH = 8
MAX_STRING = 4_096

#: Element types by name.
DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.bool,
)}  # fmt: skip
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
}


#: Names that a module has already; a constant cannot take them.
_TAKEN = frozenset(dir(torch.nn.Module()))
_KINDS = {"placeholder": "p", "get_attr": "a", "call_function": "f", "output": "o"}
_DROPPED = ("device", "layout", "pin_memory")  # programs are device free


def graph_to_json(graph: fx.Graph, layers: list[str]) -> list[list[Any]]:
    """Serialise a graph; every node in order.

    Args:
        layers: names of the layer records, which nodes refer to by index.
    """
    index: dict[fx.Node, int] = {}
    records: list[list[Any]] = []
    for node in graph.nodes:
        target = op_name(node.target) if node.op == "call_function" else str(node.target)
        record: list[Any] = [_KINDS[node.op], target, [_encode(a, index) for a in node.args]]
        info = layer_of(node)
        kwargs = {k: _encode(v, index) for k, v in node.kwargs.items() if v is not None and k not in _DROPPED}
        if kwargs or info is not None:
            record.append(kwargs)
        if info is not None:
            record.append(layers.index(info.name))
        index[node] = len(records)
        records.append(record)
    return records


def _encode(value: Any, index: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return f"%{index[value]}"
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return {"str": value} if value.startswith("%") else value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item, index) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return None  # programs are device free
    if isinstance(value, slice):
        return {"slice": [_encode(v, index) for v in (value.start, value.stop, value.step)]}
    raise ArtifactError(f"cannot store an argument of type {type(value).__name__}: {value!r}")


def graph_from_json(
    records: Any, tensors: Callable[[str], Tensor], dialect: str, layers: Sequence[LayerInfo] = ()
) -> fx.GraphModule:
    """Rebuild a graph module.

    Args:
        records: from `graph_to_json`.
        tensors: constant name -> tensor; raises KeyError for unknown names.
        dialect: whose operators are allowed.
        layers: the layer records that nodes refer to.

    Raises:
        ArtifactError: anything that `graph_to_json` would not have written.
    """
    if not isinstance(records, list) or not 2 <= len(records) <= MAX_NODES:
        raise ArtifactError(f"program: expected a list of 2 to {MAX_NODES} nodes")
    graph = fx.Graph()
    root = torch.nn.Module()
    nodes: list[fx.Node] = []
    for record in records:
        try:
            nodes.append(_node(graph, root, record, nodes, tensors, dialect, layers))
        except ArtifactError:
            raise
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise ArtifactError(f"program node {len(nodes)}: malformed ({type(error).__name__}: {error})") from None
    if nodes[-1].op != "output":
        raise ArtifactError("program: the last node is not the output")
    try:
        return fx.GraphModule(root, graph)
    except (SyntaxError, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ArtifactError(f"program: malformed ({type(error).__name__}: {error})") from None


def is_name(text: str) -> bool:
    """Whether `text` is a plain Python name. fx writes names into the code it generates: anything else could be code."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def _is_part(text: str) -> bool:
    """Whether `text` may be a part of a constant's name."""
    return (is_name(text) and text not in _TAKEN) or (text.isascii() and text.isdigit())


def _node(
    graph: fx.Graph,
    root: torch.nn.Module,
    record: Any,
    nodes: list[fx.Node],
    tensors: Callable[[str], Tensor],
    dialect: str,
    layers: Sequence[LayerInfo],
) -> fx.Node:
    kind, target, raw = record[:3]
    place = f"program node {len(nodes)}"
    if not isinstance(target, str) or len(target) > MAX_STRING:
        raise ArtifactError(f"{place}: bad target")
    if nodes and nodes[-1].op == "output":
        raise ArtifactError("program: nodes after the output")
    args = tuple(_decode(a, nodes, 0) for a in raw)
    kwargs = {k: _decode(v, nodes, 0) for k, v in (record[3] if len(record) > 3 else {}).items()}
    if not all(is_name(k) for k in kwargs):
        raise ArtifactError(f"{place}: bad argument name")
    if kind == "p" and is_name(target):
        node = graph.placeholder(target)
    elif kind == "a" and all(_is_part(part) for part in target.split(".")):
        set_constant(root, target, tensors(target))
        node = graph.get_attr(target)
    elif kind == "o":
        node = graph.output(args[0])
    elif kind == "f" and target in LEGAL[dialect][0]:
        node = graph.call_function(resolve(target), args, kwargs)
    else:
        raise ArtifactError(f"{place}: {kind!r} {target!r} is not allowed in dialect {dialect}")
    if len(record) > 4:
        number = record[4]
        if not isinstance(number, int) or not 0 <= number < len(layers):
            raise ArtifactError(f"{place}: layer record {number!r} does not exist")
        node.meta["layer"] = layers[number]
    return node


def _decode(value: Any, nodes: list[fx.Node], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ArtifactError("program: arguments nested too deeply")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        if len(value) > MAX_STRING:
            raise ArtifactError("program: a text argument is too long")
        if not value.startswith("%"):
            return value
        number = int(value[1:])
        if not 0 <= number < len(nodes):
            raise ArtifactError(f"program: node {number} is read before it exists")
        return nodes[number]
    if isinstance(value, list):
        return [_decode(item, nodes, depth + 1) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if key == "str" and isinstance(inner, str) and len(inner) <= MAX_STRING:
            return inner
        if key == "dtype" and inner in DTYPES:
            return DTYPES[inner]
        if key == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if key == "memory_format" and inner in _FORMATS:
            return _FORMATS[inner]
        if key == "slice" and isinstance(inner, list) and len(inner) == 3:
            return slice(*(_decode(v, nodes, depth + 1) for v in inner))
    raise ArtifactError(f"program: argument {str(value)[:60]!r} is not understood")


_TUPLES = ("weight_shape", "out_scale", "out_zero_point")


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    """JSON lists as the tuples they were."""
    return {k: tuple(record[k]) for k in _TUPLES if record.get(k) is not None}


#: Fields that files of earlier versions do not have.
_NEWER = {"out_scale", "out_zero_point", "float_output"}


_TEXTS = ("name", "kind", "role", "executed", "note")


def _is_record(record: dict[str, Any]) -> bool:
    """Whether the fields that every layer record has are of their types."""
    texts = all(isinstance(record[k], str) and len(record[k]) <= MAX_STRING for k in _TEXTS)
    widths = all(type(record[k]) is int and 1 <= record[k] <= 32 for k in ("weight_bits", "act_bits"))
    shape = record["weight_shape"]
    return texts and widths and isinstance(shape, list) and all(type(n) is int and 1 <= n <= 1 << 40 for n in shape)


def _is_range(record: dict[str, Any]) -> bool:
    """Whether what a layer record says of its output is sound: a positive scale and a code, or neither."""
    if not isinstance(record.get("float_output", False), bool):
        return False
    scales, zeros = record.get("out_scale"), record.get("out_zero_point")
    if scales is None or zeros is None:
        return scales is None and zeros is None
    if not isinstance(scales, list) or not isinstance(zeros, list) or not len(scales) == len(zeros) == _outputs(record):
        return False
    sound = all(isinstance(s, float) and 0 < s < math.inf for s in scales)
    return sound and all(type(z) is int and -128 <= z <= 127 for z in zeros)


def _outputs(record: dict[str, Any]) -> int:
    """Output channels of a layer record's convolution; -1 for anything else."""
    shape, axis = record.get("weight_shape"), {"conv2d": 0, "conv_transpose2d": 1}.get(str(record.get("kind")))
    sound = axis is not None and isinstance(shape, list) and len(shape) == 4 and type(shape[axis]) is int
    return shape[axis] if sound else -1  # type: ignore[index]


def layers_from_json(records: Any) -> list[LayerInfo]:
    """Layer records of a manifest.

    Raises:
        ArtifactError: not what `dataclasses.asdict` of `LayerInfo` gives.
    """
    fields = {f.name for f in dataclasses.fields(LayerInfo)}
    if not isinstance(records, list) or len(records) > MAX_NODES:
        raise ArtifactError("layers: expected a list")
    for number, r in enumerate(records):
        if not isinstance(r, dict) or not fields - _NEWER <= set(r) <= fields or not (_is_record(r) and _is_range(r)):
            raise ArtifactError(f"layers: malformed layer record {number}")
    return [LayerInfo(**{**r, **_tuples(r)}) for r in records]
