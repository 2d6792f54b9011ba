"""Carry a quantized program over to other sizes of the noisy sample.

Codes, scales, widths and corrections belong to layers and channels, not to a resolution: a network without constants of
its own for a size is the same graph at every size, but for numbers among the arguments of its operators (the sizes of a
reshape or of an upsampling). `compare` finds these numbers from two captures, before the work; `carry` writes them into
the quantized program afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.config import QuantConfig
from edadm_compile.errors import CaptureError
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, Signature, get_constant, text_of
from edadm_compile.ir.valueless import has_values
from edadm_compile.passes.base import Context, finish, run_passes
from edadm_compile.passes.lower import Lower

Shape = tuple[int, ...]
#: Where an argument is: "args" or "kwargs", then indices and names.
Place = tuple[int | str, ...]


@dataclass(frozen=True)
class OtherShape:
    """What another size changes in a float program.

    Attributes:
        signature: inputs and batch limits at that size.
        numbers: by node name, the arguments that differ: place -> (number at the first size, number at this one).
        shapes: shape of every node's value at this size.
    """

    signature: Signature
    numbers: Mapping[str, Mapping[Place, tuple[Any, Any]]]
    shapes: Mapping[str, Shape]

    @property
    def shape(self) -> Shape:
        """[C, H, W] of x."""
        return self.signature.inputs[0].shape


def compare(first: Program, other: Program) -> OtherShape:
    """Find the numbers that differ between the float programs of one network at two sizes.

    Raises:
        CaptureError: the programs differ in more than numbers; the message names the shape and the node.
    """
    shape = other.signature.inputs[0].shape
    ours, theirs = list(first.graph_module.graph.nodes), list(other.graph_module.graph.nodes)
    partners = dict(zip(ours, theirs, strict=False))
    numbers = {}
    for node, partner in partners.items():
        numbers[node.name] = _differences(first, other, node, partner, partners, shape)
    if len(ours) != len(theirs):
        longer = ours if len(ours) > len(theirs) else theirs
        raise _refusal(
            shape, longer[len(partners)], f"the graph has {len(theirs)} nodes, {len(ours)} at the first shape"
        )
    _check_tables(first, other, shape)
    shapes = {a.name: b.meta["shape"] for a, b in partners.items() if "shape" in b.meta}
    return OtherShape(other.signature, {name: found for name, found in numbers.items() if found}, shapes)


def _differences(
    first: Program, other: Program, node: fx.Node, partner: fx.Node, partners: dict[fx.Node, fx.Node], shape: Shape
) -> dict[Place, tuple[Any, Any]]:
    """Numbers among the arguments of two nodes that differ; refuses any other difference."""
    if (node.op, node.target) != (partner.op, partner.target):
        raise _refusal(shape, node, f"it is {_operation(node)}, and {_operation(partner)} at that shape")
    if node.op == "get_attr":
        values = [get_constant(p.graph_module, str(n.target)) for p, n in ((first, node), (other, partner))]
        if not _equal(*values):
            raise _refusal(shape, node, f"the constant {node.target} depends on the shape")
        return {}
    ours, theirs = dict(_leaves(node)), dict(_leaves(partner))
    if set(ours) != set(theirs):
        raise _refusal(shape, node, "its arguments are others in number")
    found = {}
    for place, value in ours.items():
        there = theirs[place]
        if (partners.get(value) if isinstance(value, fx.Node) else value) is there or _same_number(value, there):
            continue
        if not (_is_number(value) and _is_number(there)):
            raise _refusal(shape, node, "it reads other values")
        found[place] = (value, there)
    return found


def _refusal(shape: Shape, node: fx.Node, what: str) -> CaptureError:
    scope = node.meta.get("scope") or ()
    where = f" (in {scope[-1]})" if scope else ""
    return CaptureError(
        f"--shape {text_of(shape)}: the network is another graph at this shape than at the first one, first at node "
        f"{node.name}{where}: {what}; compile a file for it alone"
    )


def _operation(node: fx.Node) -> str:
    return op_name(node.target) if node.op == "call_function" else f"{node.op} {node.target}"


def _leaves(node: fx.Node) -> Iterator[tuple[Place, Any]]:
    """Arguments of a node without lists and tables around them, by their place."""
    stack: list[tuple[Place, Any]] = [(("args",), list(node.args)), (("kwargs",), dict(node.kwargs))]
    while stack:
        place, value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack += [((*place, index), item) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            stack += [((*place, name), item) for name, item in value.items()]
        elif isinstance(value, slice):
            stack += [((*place, name), getattr(value, name)) for name in ("start", "stop", "step")]
        else:
            yield place, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same_number(value: Any, there: Any) -> bool:
    return type(value) is type(there) and not isinstance(value, fx.Node) and bool(value == there)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two constants are the same; of those without values, shape and type are compared."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (has_values(a) and has_values(b)) or a.data_ptr() == b.data_ptr():
        return True
    return torch.equal(a, b)


def _check_tables(first: Program, other: Program, shape: Shape) -> None:
    """The values of the time path are the first program's."""
    ours = {} if first.time is None else first.time.tables
    theirs = {} if other.time is None else other.time.tables
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs or not _equal(ours[name], theirs[name]):
            raise CaptureError(
                f"--shape {text_of(shape)}: what the network computes from the timestep alone depends on the shape (table "
                f"{name}); compile a file for it alone"
            )


def carry(qdq: Program, other: OtherShape, config: QuantConfig) -> tuple[Program, Program]:
    """The qdq program at another size, and its lowered form: the same constants, other numbers.

    Raises:
        CaptureError: a node whose numbers differ is not what it was, or its value has not the shape it must have.
    """
    program = replace(qdq.fork(), signature=other.signature)
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    for name, changes in other.numbers.items():
        node = nodes.get(name)
        if node is None or any(dict(_leaves(node)).get(place) != old for place, (old, _) in changes.items()):
            raise _lost(other.shape, name)
        _write(node, {place: new for place, (_, new) in changes.items()})
    program = finish(program)
    try:
        propagate_shapes(program)
    except RuntimeError:  # an operator that a pass added depends on the size
        raise _lost(other.shape, "output") from None
    for name, node in nodes.items():
        if node.meta.get("shape", other.shapes.get(name)) != other.shapes.get(name, node.meta.get("shape")):
            raise _lost(other.shape, name)
    verify(program)
    return program, run_passes(program, [Lower()], Context(config))


def _lost(shape: Shape, name: str) -> CaptureError:
    return CaptureError(
        f"--shape {text_of(shape)}: the quantization cannot be carried over: node {name} does not correspond to the float "
        "model's; compile a file for this shape alone"
    )


def _write(node: fx.Node, numbers: Mapping[Place, Any]) -> None:
    """Put numbers into the arguments of a node."""
    node.args = tuple(_written(list(node.args), ("args",), numbers))
    node.kwargs = _written(dict(node.kwargs), ("kwargs",), numbers)


def _written(value: Any, place: Place, numbers: Mapping[Place, Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_written(item, (*place, i), numbers) for i, item in enumerate(value))
    if isinstance(value, dict):
        return {name: _written(item, (*place, name), numbers) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_written(getattr(value, n), (*place, n), numbers) for n in ("start", "stop", "step")))
    return numbers.get(place, value)
