"""How much memory the values of a program take, from shapes alone.

Views share the memory of what they are views of (fake tensors know their storage). Inputs and constants are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from edadm_compile.ir.analysis import fake_values
from edadm_compile.ir.program import Program

#: Bytes of values that one forward of a whole model may take; a larger batch is run in pieces.
MOST_BYTES = 2 << 30


class Footprint:
    """Bytes of the values of a program for one row (one image), averaged over the smallest batch it is measured with.

    Attributes:
        made: node -> bytes of the memory that it allocates; 0 for views, inputs and constants.
    """

    def __init__(self, program: Program) -> None:
        signature = program.signature
        rows = min(2, signature.max_batch) if signature.min_batch < signature.max_batch else signature.max_batch
        self._graph = program.graph_module.graph
        values = fake_values(program, rows)
        self._owner = _owners(self._graph, values)
        self.made: dict[fx.Node, float] = dict.fromkeys(self._graph.nodes, 0.0)
        for node, owner in self._owner.items():
            if owner is node:
                self.made[node] = values[node].untyped_storage().nbytes() / rows

    @property
    def total(self) -> float:
        """Bytes per row when every value is kept."""
        return sum(self.made.values())

    @property
    def peak(self) -> float:
        """Most bytes per row at any time when a value is freed after its last reader."""
        return self.peak_of(list(self._graph.nodes))

    def peak_of(
        self,
        nodes: Sequence[fx.Node],
        scratch: Callable[[fx.Node], float] = lambda node: 0.0,
        taken: Callable[[float], float] = lambda size: size,
    ) -> float:
        """The same for some of the nodes, run in order; what they read from outside is not counted.

        Args:
            scratch: bytes per row that a node takes besides its result while it runs.
            taken: what an allocation of so many bytes per row counts.
        """
        inside = set(nodes)
        last: dict[fx.Node, int] = {}
        for position, node in enumerate(nodes):
            for source in (node, *node.all_input_nodes):
                owner = self._owner.get(source)
                if owner in inside:
                    last[owner] = position
        freed: dict[int, float] = {}
        for owner, position in last.items():
            freed[position] = freed.get(position, 0.0) + taken(self.made[owner])
        live = most = 0.0
        for position, node in enumerate(nodes):
            live += taken(self.made[node])
            most = max(most, live + taken(scratch(node)))
            live -= freed.get(position, 0.0)
        return most


def _owners(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> dict[fx.Node, fx.Node]:
    """For each tensor node the node that allocated its memory; nothing for views of inputs and constants."""
    first: dict[int, fx.Node | None] = {}
    owners: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        value = values.get(node)
        if not isinstance(value, torch.Tensor):
            continue
        key = value.untyped_storage()._cdata
        outside = node.op in ("placeholder", "get_attr")
        owner = first.setdefault(key, None if outside else node)
        if owner is not None:
            owners[node] = owner
    return owners


def kept_by(nodes: Iterable[fx.Node]) -> float:
    """Bytes per row of all values of a piece of a graph, by the shapes its nodes carry; views count as copies."""
    return sum(value_bytes(n) for n in nodes)


def value_bytes(node: fx.Node) -> float:
    """Bytes per row of one value as a tensor of its own; 0 for one without rows, which does not grow with the batch."""
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None or dtype is None or not node.meta.get("batched"):
        return 0.0
    return float(math.prod(shape[1:]) * dtype.itemsize)


def rows_at_once(program: Program, budget: float, wanted: int) -> int:
    """Rows of a batch of `wanted` that a program runs together within `budget` bytes of values.

    All of them for a program with a fixed batch: it cuts what it is called with itself.
    """
    signature = program.signature
    if signature.min_batch == signature.max_batch:
        return wanted
    wanted = min(wanted, signature.max_batch)
    if kept_by(program.graph_module.graph.nodes) * wanted <= budget:  # does even when nothing is freed
        return wanted
    return rows_within(budget, Footprint(program).peak, wanted, signature.min_batch)


def rows_within(budget: float, per_row: float, wanted: int, least: int = 1) -> int:
    """As many of `wanted` rows as fit into `budget` bytes, at least `least`."""
    return max(min(least, wanted), min(wanted, int(budget // max(1.0, per_row))))
