"""The float and the quantized model advance through a graph side by side over the whole calibration set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import is_batched
from edadm_compile.ir.execute import run_nodes
from edadm_compile.ir.footprint import kept_by, rows_within
from edadm_compile.ir.program import Program
from edadm_compile.ir.subgraph import Unit
from edadm_compile.passes.caches import Caches
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant

_CHUNK = 64
#: Bytes of values inside a closure that one run keeps.
_MOST_BYTES = 4 << 30


def float_mode(program: Program) -> AbstractContextManager[None]:
    """Switch every quantizer off, and back to what it was."""
    return switched_off(program, ActFakeQuant, WeightFakeQuant)


@contextmanager
def switched_off(program: Program, *kinds: type[ActFakeQuant] | type[WeightFakeQuant]) -> Iterator[None]:
    """Switch the quantizers of some kinds off, and back to what they were."""
    quantizers = [m for m in program.graph_module.modules() if isinstance(m, kinds)]
    states = [m.enabled for m in quantizers]
    try:
        for module in quantizers:
            module.enabled = False
        yield
    finally:
        for module, state in zip(quantizers, states, strict=True):
            module.enabled = state


class Streams:
    """Values of the float and of the quantized model at the current position of the graph, for all samples.

    Attributes:
        float_values, quant_values: node -> [N, ...] for every node that a later step still reads, in `caches`.
    """

    def __init__(
        self, program: Program, units: Sequence[Unit], inputs: Sequence[Tensor], caches: Caches | None = None
    ) -> None:
        self.program = program
        self.caches = Caches() if caches is None else caches
        self._module = program.graph_module
        signature = program.signature
        self._fixed = signature.min_batch == signature.max_batch
        self._chunk = signature.max_batch if self._fixed else min(_CHUNK, signature.max_batch)
        self._position = {n: i for i, n in enumerate(self._module.graph.nodes)}
        inputs = [self._fill(v) for v in inputs]
        self.total = inputs[0].shape[0]
        arguments = self._graph_inputs(inputs)
        names = [n for n in self._module.graph.nodes if n.op == "placeholder"]
        self.float_values: dict[fx.Node, Tensor] = dict(zip(names, arguments, strict=True))
        self.quant_values: dict[fx.Node, Tensor] = dict(self.float_values)
        self._owned = {n for unit in units for n in unit.nodes}
        self._outputs = {unit.output for unit in units}
        self._steps = self._schedule(units)
        self._last_use = self._last_uses()
        if not self._fixed:
            largest = max((kept_by(self.closure(s)) for s in self._steps), default=0.0)
            self._chunk = rows_within(_MOST_BYTES, largest, self._chunk, signature.min_batch)

    @property
    def chunk(self) -> int:
        """Samples that run together."""
        return self._chunk

    def _fill(self, value: Tensor) -> Tensor:
        """With a fixed batch, repeat rows until the set is a whole number of batches."""
        if not self._fixed or value.shape[0] % self._chunk == 0:
            return value
        need = -(-value.shape[0] // self._chunk) * self._chunk
        return value.repeat(-(-need // value.shape[0]), *[1] * (value.dim() - 1))[:need]

    def _graph_inputs(self, inputs: list[Tensor]) -> list[Tensor]:
        pieces = [self.program.graph_inputs(list(p)) for p in zip(*(v.split(self._chunk) for v in inputs), strict=True)]
        return [self.caches.keep(torch.cat(column)) for column in zip(*pieces, strict=True)]

    def _schedule(self, units: Sequence[Unit]) -> list[Unit | fx.Node]:
        """Units at the position of their outputs, every other stored node at its own."""
        steps: list[Unit | fx.Node] = list(units)
        output = self._module.graph.output_node()
        for node in self._module.graph.nodes:
            if node not in self._owned and node is not output and self._stored(node) and node.op != "placeholder":
                steps.append(node)
        return sorted(steps, key=lambda s: self._position[s.output if isinstance(s, Unit) else s])

    def owned(self, node: fx.Node) -> bool:
        """Whether some unit holds `node`."""
        return node in self._owned

    def _stored(self, node: fx.Node) -> bool:
        """Whether a node's value is kept per sample.

        Constants, sizes, values without a sample dimension and the inside of units are recomputed by whoever reads them.
        """
        return node.op != "get_attr" and is_batched(node) and (node not in self._owned or node in self._outputs)

    def closure(self, step: Unit | fx.Node) -> list[fx.Node]:
        """The nodes to run for a step: its own and the unstored ones they need."""
        nodes = set(step.nodes) if isinstance(step, Unit) else {step}
        stack = list(nodes)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in nodes and not self._stored(source):
                    nodes.add(source)
                    stack.append(source)
        return sorted(nodes, key=self._position.__getitem__)

    def stored_inputs(self, closure: Sequence[fx.Node]) -> list[fx.Node]:
        """Stored nodes that a closure reads."""
        inside = set(closure)
        return list(dict.fromkeys(n for node in closure for n in node.all_input_nodes if n not in inside))

    def _last_uses(self) -> dict[fx.Node, int]:
        last: dict[fx.Node, int] = {}
        for number, step in enumerate(self._steps):
            for node in self.stored_inputs(self.closure(step)):
                last[node] = number
        for node in self._module.graph.output_node().all_input_nodes:
            last[node] = len(self._steps)
        return last

    def stations(self) -> Iterator[tuple[Unit | fx.Node, list[fx.Node], list[fx.Node]]]:
        """Every step in order, with its closure and the nodes whose values are kept while it runs; computes nothing."""
        live = list(self.float_values)
        for number, step in enumerate(self._steps):
            yield step, self.closure(step), list(live)
            output = step.output if isinstance(step, Unit) else step
            if self._stored(output):
                live.append(output)
            live = [n for n in live if self._last_use.get(n, -1) > number]

    def advance(self, train: Callable[[Unit], None]) -> None:
        """Walk the graph: train each unit when its inputs are there, then push all samples through."""
        for number, step in enumerate(self._steps):
            closure = self.closure(step)
            output = step.output if isinstance(step, Unit) else step
            wanted = [output] if self._stored(output) else []  # what has no sample dimension its readers recompute
            if isinstance(step, Unit):
                train(step)
            if wanted:
                with float_mode(self.program):
                    result = self.run(closure, self.float_values, wanted)
                self.quant_values.update(self.run(closure, self.quant_values, wanted))
                self.float_values.update(result)
            self._drop([n for n in self.float_values if self._last_use.get(n, -1) <= number])
        self._drop(list(self.float_values))

    def _drop(self, nodes: Sequence[fx.Node]) -> None:
        for node in nodes:
            self.caches.release(self.float_values.pop(node), self.quant_values.pop(node))

    def float_targets(
        self, closure: Sequence[fx.Node], wanted: Sequence[fx.Node], dtype: torch.dtype = torch.float32
    ) -> dict[fx.Node, Tensor]:
        """Float values [N, ...] of those of `wanted` inside a closure that have one row per sample, stored as `dtype`."""
        with float_mode(self.program):
            return self.run(closure, self.float_values, [n for n in wanted if is_batched(n)], dtype)

    def float_rows(self, closure: Sequence[fx.Node], wanted: Sequence[fx.Node], rows: Tensor) -> dict[fx.Node, Tensor]:
        """Float values of nodes inside a closure for some samples, whatever their layout (tokens of all samples in one list, say)."""
        values: dict[fx.Node, Any] = {n: self.float_values[n][rows] for n in self.stored_inputs(closure)}
        with torch.no_grad(), float_mode(self.program):
            run_nodes(self._module, closure, values, wanted)
        return {n: values[n] for n in wanted}

    def run(
        self,
        closure: Sequence[fx.Node],
        stored: dict[fx.Node, Tensor],
        wanted: Sequence[fx.Node],
        dtype: torch.dtype = torch.float32,
    ) -> dict[fx.Node, Tensor]:
        """Run a closure over all samples in chunks; returns the wanted values [N, ...], in caches, float32 as `dtype`."""
        inputs = self.stored_inputs(closure)
        found: dict[fx.Node, Tensor] = {}
        with torch.no_grad():
            for rows in torch.arange(self.total).split(self._chunk):
                window = slice(int(rows[0]), int(rows[-1]) + 1)
                values: dict[fx.Node, Any] = {n: stored[n][window] for n in inputs}
                run_nodes(self._module, closure, values, wanted)
                for node in wanted:
                    if node not in found:
                        like = values[node]
                        found[node] = self.caches.empty(
                            self.total, like.to(dtype) if like.dtype == torch.float32 else like
                        )
                    found[node][window] = values[node]
        return found
