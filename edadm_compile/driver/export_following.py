"""What an exported graph computes between its layers, followed in torch on ONNX Runtime's own values.

Two right engines drift apart by whole codes wherever a value lies on the border of two, so that the values of one cannot be
compared tightly with those of the other. Here the prepared program is run node by node, and where ONNX Runtime's values are
known (what layers read and write) they take the place of torch's. Every code is then held against the unrounded value that
torch computes from ONNX Runtime's values in front of it, and a wrong norm, activation or time table is seen where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.export.convert import OUTPUT, Exported, ExportedLayer
from edadm_compile.ir.execute import evaluate
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import get_constant
from edadm_compile.ir.quantizers import DEQUANTIZE, QUANTIZE
from edadm_compile.quant import affine
from edadm_compile.quant.spec import act_spec

#: What float32 operators in another order may differ by, of a tensor's largest value; 5e-7 was measured.
ROUNDING = 2.0**-16
#: A code may be the second nearest where rounding explains it or, after an unlucky cancellation, in this share of places.
STEPS, SHARE = 1.0, 1e-3
#: Rounding is counted for values up to this many times the range of codes; what is farther is clipped on both sides.
_REACH = 32
_COARSE = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Distance:
    """How far ONNX Runtime is from the program at one place.

    Attributes:
        error: largest distance; of codes in steps from the unrounded value, of floats relative to the largest value.
        rounding: as much as rounding alone explains.
        failure: what is wrong with it, with what is allowed; empty if nothing is.
    """

    error: float
    rounding: float
    failure: str


@dataclass
class Following:
    """One walk through an exported program.

    Args:
        exported: the graph and the program it was written from.
        found: ONNX Runtime's values by name, among them all borders of layers (`export.probes`).
        layers_too: also compute the layers in torch, and compare their outputs: for graphs whose layers have no integer
            twin. Otherwise they are skipped, as their outputs are known.
        further: relative difference that is allowed beyond `ROUNDING`.

    Attributes:
        inputs: distance of the input codes by layer name; codes read by several layers count for the first.
        outputs: distance of the output by layer name, with `layers_too`.
    """

    exported: Exported
    found: dict[str, Any]
    layers_too: bool = False
    further: float = 0.0
    inputs: dict[str, Distance] = field(default_factory=dict)
    outputs: dict[str, Distance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._module = self.exported.prepared.graph_module
        self._values: dict[fx.Node, Any] = {}
        self._reach: dict[fx.Node, float] = {}  # largest code of a quantizer's result if it were not clipped
        self._unit: dict[fx.Node, float] = {}  # relative rounding of the coarsest float type a value went through
        self._read, self._written = _borders(self.exported.layers)

    def run(self, inputs: Sequence[Tensor]) -> Distance:
        """Walk through the program.

        Args:
            inputs: x, t and conditions that `found` was computed from.

        Returns:
            distance of the prediction; `inputs` and `outputs` are filled.
        """
        graph = self._module.graph
        arguments = dict(zip(_placeholders(graph), self.exported.prepared.graph_inputs(inputs), strict=True))
        needed = self._needed()
        last = {source: node for node in graph.nodes if node in needed for source in node.all_input_nodes}
        distance = Distance(0.0, 0.0, "")
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "output":
                    distance = self._prediction(node)
                elif node in needed:
                    self._values[node] = arguments[node] if node in arguments else self._value(node)
                    self._visit(node)
                    for source in (*node.all_input_nodes, node):  # itself where only layers read it, which are skipped
                        if last.get(source, node) is node:
                            self._values.pop(source, None)
        return distance

    def _needed(self) -> set[fx.Node]:
        """Nodes whose values are compared or lead to one that is."""
        needed: set[fx.Node] = set()
        waiting = [self._module.graph.output_node(), *self._read, *(self._written if self.layers_too else ())]
        while waiting:
            node = waiting.pop()
            if node not in needed:
                needed.add(node)
                waiting += () if self._skips(node) else node.all_input_nodes
        return needed

    def _skips(self, node: fx.Node) -> bool:
        return node in self._written and not self.layers_too

    def _value(self, node: fx.Node) -> Any:
        """Value of a node; codes are float64 and not rounded, which moves of codes do not mind."""
        if self._skips(node):
            return self._border(self._written[node])
        self._unit[node] = max((self._unit.get(n, 0.0) for n in node.all_input_nodes), default=0.0)
        name = op_name(node.target) if node.op == "call_function" else ""
        if name == QUANTIZE:
            return self._position(node)
        if name == DEQUANTIZE:
            codes, scale, zero = (self._values[n] for n in node.args)  # type: ignore[index]
            return affine.dequantize(codes.round().float(), scale, zero)
        value = evaluate(self._module, node, self._values)
        if isinstance(value, Tensor):
            if value.dtype in _COARSE:
                self._unit[node] = max(self._unit[node], torch.finfo(value.dtype).eps)
            if node.all_input_nodes and node.all_input_nodes[0] in self._reach and value.dtype == torch.float64:
                self._reach[node] = self._reach[node.all_input_nodes[0]]
        return value

    def _position(self, node: fx.Node) -> Tensor:
        """Where a value lies among the codes, float64."""
        source, scale, zero = (self._values[n] for n in node.args[:3])  # type: ignore[index]
        position = source.double() / scale.double() + zero.double()
        bits = int(node.args[3])  # type: ignore[arg-type]
        self._reach[node] = min(float(position.abs().max()), _REACH * 2**bits)
        spec = act_spec(bits, bool(node.args[4]))
        clipped: Tensor = position.clamp(spec.qmin, spec.qmax)
        return clipped

    def _visit(self, node: fx.Node) -> None:
        """Compare where something is known, and go on with what ONNX Runtime has."""
        if node in self._written and self.layers_too:
            layer = self._written[node]
            known = self._border(layer)
            compare = self._floats if layer.quantizer is None else self._codes
            self.outputs[layer.info.name] = compare(known, node, "output", self._bias_rounding(layer))
            self._values[node], self._unit[node] = known, 0.0
        elif node in self._read and node not in self._written:
            layer, names = self._read[node]
            codes = [signed_codes(self.found[name]).double() for name in names]
            known = codes[0] if len(codes) == 1 else 256 * codes[0] + codes[1]
            distance = self._codes(known, node, "input")
            before = self.inputs.get(layer.info.name)
            if before is None or distance.failure or not before.failure:
                self.inputs[layer.info.name] = distance
            self._values[node], self._unit[node] = known, 0.0

    def _border(self, layer: ExportedLayer) -> Tensor:
        """ONNX Runtime's output of a layer."""
        assert layer.output is not None
        value = self.found[str(layer.output.name)]
        return torch.from_numpy(value) if layer.quantizer is None else signed_codes(value).double()

    def _allowed(self, node: fx.Node) -> float:
        """Relative difference that rounding explains."""
        return ROUNDING + self.further + 2 * self._unit.get(node, 0.0)

    def _bias_rounding(self, layer: ExportedLayer) -> float:
        """What a bias may be wrong by where ONNX Runtime makes whole units ``s_x s_w`` of it; in output codes if there are."""
        if layer.info.kind == "matmul":
            return 0.0
        x, w = layer.node.args[:2]
        x_scale, unit = (get_constant(self._module, str(n.args[1].target)) for n in (x, w))  # type: ignore[union-attr]
        unit = x_scale * unit.reshape(-1)
        if layer.quantizer is not None:
            unit = unit / get_constant(self._module, str(layer.quantizer.args[1].target)).reshape(-1)  # type: ignore[union-attr]
        return 0.5 * float(unit.max())

    def _codes(self, found: Tensor, node: fx.Node, side: str, further: float = 0.0) -> Distance:
        wanted = self._values[node]
        if found.shape != wanted.shape:
            return Distance(float("inf"), 0.0, f"its {side} is {list(found.shape)}, not {list(wanted.shape)}")
        distance = (found - wanted).abs()
        nearest = 0.5 + self._allowed(node) * max(256.0, self._reach.get(node, 0.0)) + further
        most, limit = float(distance.max()), max(nearest, 0.5 + STEPS)
        share = float((distance > nearest).double().mean())
        if not most <= limit:
            what = f"its {side} codes lie up to {most:.1f} steps from the values that they stand for; {limit:.1f} are allowed"
        elif share > SHARE:
            what = f"{share:.1%} of its {side} codes are not the nearest to their values; {SHARE:.1%} are allowed"
        else:
            what = ""
        return Distance(most, nearest, what)

    def _floats(self, found: Tensor, node: fx.Node, side: str, further: float = 0.0) -> Distance:
        wanted = self._values[node]
        if found.shape != wanted.shape:
            return Distance(float("inf"), 0.0, f"the {side} is {list(found.shape)}, not {list(wanted.shape)}")
        largest = float(wanted.abs().max()) or 1.0
        error = float((found - wanted).abs().max()) / largest
        allowed = self._allowed(node) + further / largest
        what = f"the {side} differs by {error:.1e} of its largest value; {allowed:.1e} is allowed"
        return Distance(error, allowed, "" if error <= allowed else what)

    def _prediction(self, output: fx.Node) -> Distance:
        (source,) = output.all_input_nodes
        return self._floats(torch.from_numpy(self.found[OUTPUT]), source, "value behind the last layer")


def signed_codes(value: Any) -> Tensor:
    """8-bit codes of ONNX Runtime as in the program: int8."""
    found = torch.from_numpy(value)
    return found if found.dtype == torch.int8 else (found.to(torch.int16) - 128).to(torch.int8)


def _borders(
    layers: Sequence[ExportedLayer],
) -> tuple[dict[fx.Node, tuple[ExportedLayer, list[str]]], dict[fx.Node, ExportedLayer]]:
    """The first layer that reads a node's codes, with their names in the graph, and the layer that writes a node."""
    read: dict[fx.Node, tuple[ExportedLayer, list[str]]] = {}
    for layer in layers:
        terms = len(layer.codes) // max(1, len(layer.sources))
        for index, source in enumerate(layer.sources):
            names = [str(v.name) for v in layer.codes[index * terms : (index + 1) * terms]]
            read.setdefault(source, (layer, names))
    return read, {layer.result: layer for layer in layers if layer.output is not None}


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]
