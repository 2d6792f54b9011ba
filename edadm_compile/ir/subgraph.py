"""Find reconstruction units in a graph by dataflow, and run pieces of a graph.

A residual region is what lies between a fork and the addition or gate where its branches meet: the immediate
dominator d of a merge a, and every node on a path from d to a, when nothing inside is read outside. That finds
residual, attention and transformer blocks whatever their classes are called; module paths only help to join
neighbouring regions of one transformer block and to group plain chains of layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from edadm_compile.ir.analysis import is_layer, scope_of, x_dependent
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import pixels_of
from edadm_compile.ir.program import Program, layer_of

_MERGES = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor")


@dataclass(frozen=True)
class Unit:
    """A piece of a graph with one output that is reconstructed together.

    Attributes:
        nodes: in graph order, output last.
        layers: the quantized layers among them.
        kind: "block" (a residual region), "chain" (layers of one module) or "layer".
    """

    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]
    kind: str

    @property
    def output(self) -> fx.Node:
        """The one node that the rest of the graph reads."""
        return self.nodes[-1]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside that the unit reads, in graph order of first use."""
        inside = set(self.nodes)
        return tuple(dict.fromkeys(n for node in self.nodes for n in node.all_input_nodes if n not in inside))

    @property
    def name(self) -> str:
        """Longest common module path of its layers, or the single layer's name."""
        names = [info.name for node in self.layers if (info := layer_of(node))]
        parts = [name.split(".") for name in names]
        common = []
        for column in zip(*parts, strict=False):
            if len(set(column)) > 1:
                break
            common.append(column[0])
        return ".".join(common) or names[0]


def find_units(program: Program, max_layers: int = 8) -> list[Unit]:
    """Partition the quantized layers of a graph into units, in execution order.

    Args:
        max_layers: no region with more layers becomes a block.
    """
    graph = program.graph_module.graph
    index = {node: i for i, node in enumerate(graph.nodes)}
    layers = [n for n in graph.nodes if _is_quantized(n)]
    flow = _Flow(graph)
    regions = [r for n in graph.nodes if (r := flow.region(n)) is not None]
    units = _join_same_scope(_accept_regions(regions, layers, index, max_layers), max_layers + 4)
    units = [_absorb(unit, units, index, layers) for unit in units]
    claimed = {n for unit in units for n in unit.nodes}
    units += _scope_chains(graph, [n for n in layers if n not in claimed], claimed, index)
    claimed = {n for unit in units for n in unit.nodes}
    units += _single_layers([n for n in layers if n not in claimed])
    units = [_absorb(unit, units, index, []) for unit in units]
    return sorted(units, key=lambda u: index[u.output])


class _Flow:
    """Dominators of the x-dependent part of a graph; pieces of a split concatenation read the concatenation."""

    def __init__(self, graph: fx.Graph) -> None:
        members = x_dependent(graph)
        # Quantizers are looked through: one that is shared with a distant reader must not tie two regions together.
        self.nodes = [n for n in graph.nodes if n in members and n.op != "call_module"]
        by_name = {n.name: n for n in self.nodes}
        self.preds: dict[fx.Node, list[fx.Node]] = {}
        self.succs: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for node in self.nodes:
            cat = by_name.get(node.meta.get("split_of", ""))
            inputs = [self._source(p) for p in node.all_input_nodes if p in members]
            self.preds[node] = [cat] if cat is not None else inputs
            for pred in self.preds[node]:
                self.succs[pred].append(node)
        self.depth: dict[fx.Node, int] = {}
        self.idom: dict[fx.Node, fx.Node | None] = {}
        for node in self.nodes:
            self.idom[node] = self._meet(self.preds[node])
            above = self.idom[node]
            self.depth[node] = 0 if above is None else self.depth[above] + 1

    @staticmethod
    def _source(node: fx.Node) -> fx.Node:
        while node.op == "call_module":
            node = node.all_input_nodes[0]
        return node

    def _meet(self, preds: list[fx.Node]) -> fx.Node | None:
        if not preds:
            return None
        current: fx.Node | None = preds[0]
        for other in preds[1:]:
            a, b = current, other
            while a is not b and a is not None and b is not None:
                if self.depth[a] >= self.depth[b]:
                    a = self.idom[a]
                else:
                    b = self.idom[b]  # type: ignore[assignment]
            current = a if a is b else None
        return current

    def region(self, merge: fx.Node) -> set[fx.Node] | None:
        """Nodes after the fork up to `merge`, or None when it is no closed merge of two branches."""
        if merge.op != "call_function" or op_name(merge.target) not in _MERGES or merge not in self.preds:
            return None
        if len(self.preds[merge]) < 2 or merge.meta.get("split_sum"):
            return None
        fork = self.idom[merge]
        inside: set[fx.Node] = set()
        stack = [merge]
        while stack:
            node = stack.pop()
            if node in inside or node is fork:
                continue
            inside.add(node)
            stack.extend(self.preds[node])
        leaks = any(user not in inside for n in inside if n is not merge for user in self.succs[n])
        return None if leaks or fork is None else inside


def _accept_regions(
    regions: Iterable[set[fx.Node]], layers: list[fx.Node], index: dict[fx.Node, int], max_layers: int
) -> list[Unit]:
    """Largest regions first, disjoint, with 1 to `max_layers` layers."""
    wanted = set(layers)
    taken: set[fx.Node] = set()
    units = []
    for region in sorted(regions, key=lambda r: (-len(r), min(index[n] for n in r))):
        count = len(region & wanted)
        if 1 <= count <= max_layers and not region & taken:
            taken |= region
            units.append(_unit(region, wanted, index, "block"))
    return sorted(units, key=lambda u: index[u.output])


def _unit(nodes: Iterable[fx.Node], layers: set[fx.Node], index: dict[fx.Node, int], kind: str) -> Unit:
    ordered = tuple(sorted(nodes, key=index.__getitem__))
    return Unit(ordered, tuple(n for n in ordered if n in layers), kind)


def _join_same_scope(units: list[Unit], max_layers: int) -> list[Unit]:
    """Join neighbours that feed only each other inside one module (the parts of a transformer block)."""
    joined: list[Unit] = []
    for unit in units:
        last = joined[-1] if joined else None
        if (
            last is not None
            and scope_of(last.output)[-1:] == scope_of(unit.output)[-1:] != ()
            and last.output in unit.inputs
            and all(user in unit.nodes for user in last.output.users)
            and len(last.layers) + len(unit.layers) <= max_layers
        ):
            joined[-1] = Unit((*last.nodes, *unit.nodes), (*last.layers, *unit.layers), "block")
        else:
            joined.append(unit)
    return joined


def _scope_chains(
    graph: fx.Graph, loose: list[fx.Node], claimed: set[fx.Node], index: dict[fx.Node, int]
) -> list[Unit]:
    """Two to four loose layers of one module with a single output, deepest modules first."""
    scopes = sorted({s for n in loose for s in scope_of(n)}, key=lambda s: (-s.count("."), s))
    taken = set(claimed)
    units = []
    dependent = x_dependent(graph)
    for scope in scopes:
        nodes = {n for n in graph.nodes if scope in scope_of(n) and n in dependent}
        layers = [n for n in loose if n in nodes and n not in taken]
        if not 2 <= len(layers) <= 4 or nodes & taken:
            continue
        outputs = [n for n in nodes if any(user not in nodes for user in n.users)]
        if len(outputs) != 1:
            continue
        body = {n for n in nodes if index[n] <= index[outputs[0]]}
        taken |= body
        units.append(_unit(body, set(loose), index, "chain"))
    return units


def _single_layers(loose: list[fx.Node]) -> list[Unit]:
    """Each remaining layer alone; the pieces of a split layer together with their sums."""
    units: list[Unit] = []
    done: set[fx.Node] = set()
    for node in loose:
        if node in done:
            continue
        layers, tail = [node], output_of(node)
        nodes = _with_output(node)
        while len(tail.users) == 1 and next(iter(tail.users)).meta.get("split_sum"):
            total = next(iter(tail.users))
            others = [n for n in loose if n not in layers and output_of(n) in total.all_input_nodes]
            nodes += [*(part for n in others for part in _with_output(n)), total]
            layers += others
            tail = total
        done.update(layers)
        units.append(Unit(tuple(nodes), tuple(layers), "layer"))
    return units


def output_of(layer: fx.Node) -> fx.Node:
    """What the graph reads of a layer: its output quantizer where it has one, else its value."""
    value = pixels_of(layer)
    readers = list(value.users)
    return readers[0] if len(readers) == 1 and readers[0].meta.get("output_quantizer") else value


def _with_output(layer: fx.Node) -> list[fx.Node]:
    """A layer and what lies between it and `output_of` it, in order."""
    nodes, last = [layer], output_of(layer)
    while nodes[-1] is not last:
        nodes.append(next(iter(nodes[-1].users)))
    return nodes


def _absorb(unit: Unit, units: list[Unit], index: dict[fx.Node, int], layers: list[fx.Node]) -> Unit:
    """Add what only this unit reads: weights, quantizers and conditioning branches with their `layers`.

    Values that depend on x stay outside: they are the unit's cached inputs.
    """
    dependent = x_dependent(unit.output.graph)
    others = {n for u in units if u is not unit for n in u.nodes}
    nodes = set(unit.nodes)
    loose = set(layers)
    stack = list(nodes)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in nodes or node in others or node.op == "placeholder" or any(u not in nodes for u in node.users):
                continue
            if node.op in ("get_attr", "call_module") or (
                node not in dependent and (node in loose or not _is_quantized(node))
            ):
                nodes.add(node)
                stack.extend([node, *node.users])  # a sibling may have become private
    output = unit.output
    ordered = sorted(nodes - {output}, key=index.__getitem__)
    inside = [n for n in (*ordered, output) if _is_quantized(n)]
    return Unit((*ordered, output), tuple(inside), unit.kind)


def _is_quantized(node: fx.Node) -> bool:
    return is_layer(node) and (info := layer_of(node)) is not None and info.weight_bits < 32
