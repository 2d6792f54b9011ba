"""Ranges of what layers read, step by step of a sampler, and the ranges that their quantizers can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.ir.quantizers import DEQUANTIZE, QUANTIZE
from edadm_compile.quant.spec import act_spec

#: Values of one activation at one step that quantiles are taken of; more are thinned out evenly.
_KEPT = 16_384
#: Lower and upper quantile.
QUANTILES = (0.01, 0.99)


@dataclass
class LayerRange:
    """What one layer reads at each step.

    Attributes:
        low, high: smallest and largest value.
        lower, upper: the quantiles of `QUANTILES`.
    """

    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, pieces: list[Seen]) -> None:
        """Append one step, seen in one or more slices of the batch."""
        self.low.append(min(p.low for p in pieces))
        self.high.append(max(p.high for p in pieces))
        lower, upper = torch.quantile(torch.cat([p.kept for p in pieces]), torch.tensor(QUANTILES)).tolist()
        self.lower.append(lower)
        self.upper.append(upper)


@dataclass(frozen=True)
class Seen:
    """What is kept of one activation: its extremes, and values spread evenly over it."""

    low: float
    high: float
    kept: Tensor


def seen(x: Tensor) -> Seen:
    """A summary of an activation, so that it need not be held until the end of a call."""
    flat = x.detach().reshape(-1).float()
    low, high = torch.aminmax(flat)
    return Seen(float(low), float(high), flat[:: -(-flat.numel() // _KEPT)].clone())


class RangeRecorder(fx.Interpreter):
    """A float program as a predictor that notes, at every call, what its annotated layers read.

    Args:
        program: float dialect with layer records; call it once for each sampler step.

    Attributes:
        ranges: by layer name, one entry per call.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._program = program
        watched: dict[fx.Node, list[str]] = {}
        for node in program.graph_module.graph.nodes:
            info = layer_of(node)
            if info is not None and info.act_bits < 32 and isinstance(node.args[0], fx.Node):
                watched.setdefault(node.args[0], []).append(info.name)
        self._watched = watched
        self._seen: dict[fx.Node, list[Seen]] = {}
        self.ranges: dict[str, LayerRange] = {name: LayerRange() for names in watched.values() for name in names}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._watched and isinstance(result, Tensor):
            self._seen.setdefault(n, []).append(seen(result))
        return result

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Predict for x [B, C, H, W], t [B] and conditions, and note the ranges of this step."""
        self._seen.clear()
        parts = []
        with torch.no_grad():
            for piece, rows in self._program.signature.batches(list(inputs)):
                parts.append(self.run(*self._program.graph_inputs(piece))[:rows])
        for node, pieces in self._seen.items():
            step = LayerRange()
            step.add(pieces)
            for name in self._watched[node]:
                found = self.ranges[name]
                for mine, new in zip(vars(found).values(), vars(step).values(), strict=True):
                    mine += new
        self._seen.clear()
        return torch.cat(parts)


def quantizer_ranges(program: Program) -> dict[str, tuple[float, float]]:
    """Smallest and largest value that the input codes of each quantized layer stand for, from a qdq program.

    Layers whose input has a scale for each channel are left out.
    """
    found = {}
    for node in program.graph_module.graph.nodes:
        info = layer_of(node)
        if info is None or info.act_bits == 32:
            continue
        codes = _first(_first(node.args[0], DEQUANTIZE), QUANTIZE)
        limits = None if codes is None else _limits(program, codes)
        if limits is not None:
            found[info.name] = limits
    return found


def _first(node: Any, operator: str) -> fx.Node | None:
    """The nearest node with this operator on the way up through first operands."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if op_name(node.target) == operator:
            return node
        node = node.args[0] if node.args else None
    return None


def _limits(program: Program, quantize: fx.Node) -> tuple[float, float] | None:
    scale, zero = (get_constant(program.graph_module, str(a.target)) for a in quantize.args[1:3])  # type: ignore[union-attr]
    if scale.numel() != 1:
        return None
    spec = act_spec(int(quantize.args[3]), bool(quantize.args[4]))  # type: ignore[arg-type]
    step, offset = float(scale), float(zero)
    return (spec.qmin - offset) * step, (spec.qmax - offset) * step
