"""Find the convolutions whose output must not become 8-bit codes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from edadm_compile.config import QuantConfig
from edadm_compile.ir.analysis import layer_weight, shape_of
from edadm_compile.ir.output_codes import can_be_float, pixels_of, writes_codes
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.checkpoint import Saved
from edadm_compile.passes.output_ranges import KEEP, ChannelObserver
from edadm_compile.passes.records import layer_records, set_layer_records
from edadm_compile.passes.sensitivity import (
    MEASURE_LIMIT,
    measurement_pieces,
    output_energy,
    output_error,
    values_of,
)
from edadm_compile.quant.affine import dequantize, quantize
from edadm_compile.quant.spec import act_spec

#: All remaining output codes together may cost this much (dB): well below the noise of 8-bit activations.
_TARGET_DB = 45.0
#: Share of the multiplications of all convolutions in layers with a float output, which take twice the time.
_LARGEST_SHARE = 0.15
#: A float output must take this many times the share of the remaining error that it takes of the multiplications.
_WORTH = 5.75
#: Layers behind the stem that get a float output where measuring would take too long.
_UNMEASURED = 2


@dataclass(frozen=True)
class FloatOutputs:
    """Annotates a float graph; changes no operator. For engines whose integer convolution writes codes.

    1. convolutions whose 8-bit output hurts most per multiplication → ``float_output``, worst first, each that is
       `_WORTH` it, until the others together stay below `_TARGET_DB`, within `_LARGEST_SHARE` of the multiplications;
       above `MEASURE_LIMIT` parameters the first convolutions behind the stem instead

    Does nothing in the baseline and with strict widths.
    """

    name: str = "float_outputs"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Measure and annotate."""
        nodes = candidates(program, ctx.config)
        if not nodes:
            return PassResult(program, False, {"float_outputs": []})
        if not measurable(program, nodes):
            chosen, errors = [n for n in nodes if can_be_float(n, layer_of(n))][:_UNMEASURED], {}
        else:
            errors = self._errors(program, nodes, ctx)
            chosen = _worst(program, errors)
        for node in chosen:
            info = layer_of(node)
            assert info is not None
            node.meta["layer"] = replace(info, float_output=True)
        names = {_name(n): e for n, e in errors.items()}
        return PassResult(program, True, {"float_outputs": [_name(n) for n in chosen], "output_sensitivity": names})

    def state(self, program: Program) -> Saved:
        """The layer records."""
        return Saved(values={"layers": layer_records(program)})

    def restore(self, program: Program, saved: Saved) -> Program:
        """Write the layer records back."""
        set_layer_records(program, saved.values["layers"])
        return program

    @staticmethod
    def _errors(program: Program, nodes: list[fx.Node], ctx: Context) -> dict[fx.Node, float]:
        """Noise-to-signal ratio of the model's output when one convolution alone writes codes."""
        pieces = measurement_pieces(program, ctx)
        ctx.progress.stage("output codes", len(nodes) * len(pieces))
        ranges = _ranges(program, nodes, pieces, ctx)
        errors, energy = dict.fromkeys(nodes, 0.0), 0.0
        for piece in pieces:
            values = values_of(program, piece)
            for node in nodes:
                value = pixels_of(node)
                changed: dict[fx.Node, Any] = {value: _coded(values[value], *ranges[node])}
                errors[node] += output_error(program, changed, values)
                ctx.progress.advance(1, _name(node))
            energy += output_energy(program, values)
            del values  # before those of the next piece are computed
        return {node: error / energy for node, error in errors.items()}


def candidates(program: Program, config: QuantConfig) -> list[fx.Node]:
    """Convolutions that write codes and could get a float output instead; none in the baseline and with strict widths."""
    if config.uniform or not config.recipe.edges:
        return []
    return [n for n in program.graph_module.graph.nodes if writes_codes(n, layer_of(n))]


def measurable(program: Program, nodes: Sequence[fx.Node]) -> bool:
    """Whether the convolutions are small enough for one forward each."""
    return sum(layer_weight(program, n).numel() for n in nodes) <= MEASURE_LIMIT


def _ranges(
    program: Program, nodes: list[fx.Node], pieces: list[tuple[Tensor, ...]], ctx: Context
) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The best scale and zero point of each channel of each convolution's output, over the whole measurement batch."""
    observers = {node: ChannelObserver() for node in nodes}
    generator, keep = ctx.generator(5), -(-KEEP // len(pieces))
    for node, observer in observers.items():
        observer.kept.reserve(keep * len(pieces), shape_of(pixels_of(node))[1])
    for piece in pieces:
        values = values_of(program, piece)
        for node, observer in observers.items():
            observer.update(values[pixels_of(node)], keep, generator)
        del values
    return {node: observer.affine(_name(node), minmax=False) for node, observer in observers.items()}


def _coded(value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The value [B, C, H, W] rounded to 8-bit codes."""
    scale, zero = scale.reshape(-1, 1, 1), zero_point.reshape(-1, 1, 1)
    spec = act_spec(8)
    return dequantize(quantize(value, scale, zero, spec.qmin, spec.qmax), scale, zero)


def _worst(program: Program, errors: dict[fx.Node, float]) -> list[fx.Node]:
    allowed, remaining = 10 ** (-_TARGET_DB / 10), sum(errors.values())
    products = sum(_products(program, n) for n in errors)
    budget = _LARGEST_SHARE * products
    chosen: list[fx.Node] = []
    for node in sorted(errors, key=lambda n: (-errors[n] / _products(program, n), n.name)):
        if remaining <= allowed:
            break
        worthwhile = errors[node] / remaining >= _WORTH * _products(program, node) / products
        if worthwhile and _products(program, node) <= budget and can_be_float(node, layer_of(node)):
            budget -= _products(program, node)
            remaining -= errors[node]
            chosen.append(node)
    return chosen


def _products(program: Program, node: fx.Node) -> int:
    """Multiplications of a convolution for one image."""
    return layer_weight(program, node).numel() * math.prod(shape_of(node)[2:])


def _name(node: fx.Node) -> str:
    info = layer_of(node)
    assert info is not None
    return info.name
