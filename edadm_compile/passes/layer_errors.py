"""Squared error of the predicted noise when one layer alone is quantized, for each width it could have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import CalibrationError
from edadm_compile.ir.analysis import is_batched, is_layer, layer_weight, shape_of, weight_node
from edadm_compile.ir.program import LayerInfo, Program
from edadm_compile.passes.base import Context
from edadm_compile.passes.calibrate import ActivationObserver
from edadm_compile.passes.insert_quant import weight_axis
from edadm_compile.passes.sensitivity import (
    Rounding,
    measurement_inputs,
    measurement_weights,
    output_energy,
    output_error,
    values_of,
)
from edadm_compile.quant.affine import dequantize, per_channel, quantize, weight_codes
from edadm_compile.quant.observers import search_weight
from edadm_compile.quant.spec import act_spec, weight_spec

#: Bytes of float values that one forward of the measurement may keep: those of the float run, and as many changed ones.
_MOST_BYTES = 1 << 30
#: Values of each activation for its range, over the whole measurement; as in `calibrate`.
_KEEP = 40_000
#: Clip candidates of the weight range search; coarser than the real one, the error hardly changes.
_CANDIDATES = 40


@dataclass(frozen=True)
class Options:
    """What one layer could become.

    Attributes:
        node: a layer, or a product of two activations.
        infos: its possible records; a single one where nothing is free.
    """

    node: fx.Node
    infos: tuple[LayerInfo, ...]

    @property
    def name(self) -> str:
        """Name of the layer."""
        return self.infos[0].name


_Affine = tuple[Tensor, Tensor]


def layer_errors(program: Program, layers: Sequence[Options], ctx: Context) -> tuple[list[tuple[float, ...]], float]:
    """Measure every option of every layer, with the rest of the network in float.

    Weights and inputs are rounded to nearest with searched ranges. The batch is that of
    `sensitivity.measurement_inputs`, in slices that keep at most `_MOST_BYTES` of values, and its rows count as
    `measurement_weights` says, so that the sums estimate those over all sampler steps.

    Returns:
        (squared output error by option, for each layer; squared output of the float model), weighted sums.

    Raises:
        CalibrationError: the model's output is not finite, or zero everywhere.
    """
    slices = _slices(program, ctx)
    ctx.progress.stage("layer sensitivity", len(slices) * (1 + sum(len(o.infos) for o in layers)))
    ranges = _ranges(program, layers, [inputs for inputs, _ in slices], ctx)
    scales = _weight_scales(program, layers)
    errors = torch.zeros(len(layers), max((len(o.infos) for o in layers), default=0), dtype=torch.float64)
    signal = 0.0
    for inputs, weights in slices:
        values = values_of(program, inputs)
        signal += output_energy(program, values, weights)
        for number in ctx.world.turns(len(layers)):
            options = layers[number]
            for i, info in enumerate(options.infos):
                rounding = _rounding(options.node, info, ranges, scales)
                errors[number, i] += output_error(program, {}, values, {options.node: rounding}, weights)
                ctx.progress.advance(ctx.world.size, options.name)
        del values  # before those of the next slice are computed
    ctx.world.add([errors])
    if not (0 < signal < math.inf and bool(errors.isfinite().all())):
        raise CalibrationError(
            f"the predicted noise has energy {signal} on the calibration states, or a layer's error is not finite: widths "
            "cannot be chosen by their error; check the checkpoint, or compile without budget_bits and min_sqnr"
        )
    return [tuple(found[: len(o.infos)]) for o, found in zip(layers, errors.tolist(), strict=True)], signal


def weight_errors(program: Program, layers: Sequence[Options], ctx: Context) -> list[tuple[float, ...]]:
    """Stand-in for `layer_errors` that does not run the model: relative weight errors.

    A layer counts `|w_fq - w|^2 / |w|^2`, the noise-to-signal ratio of its output for white inputs, times the share of
    x's positions that its output has: layers at low resolution hardly show (docs/quantization.md, section 7).
    """
    ctx.progress.stage("weight errors", len(layers))
    scales = _weight_scales(program, layers)
    errors = []
    for options in layers:
        errors.append(tuple(_weight_error(program, options.node, i, scales) for i in options.infos))
        ctx.progress.advance(1, options.name)
    return errors


def _slices(program: Program, ctx: Context) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Inputs of the measurement, and the weights of their rows."""
    trajectories, size = ctx.calibration.trajectories, _rows(program)
    branches = program.sampler.branches
    inputs = [v.split(size) for v in measurement_inputs(trajectories, program.signature, branches)]
    weights = measurement_weights(trajectories, program.signature, branches).split(size)
    return list(zip(zip(*inputs, strict=True), weights, strict=True))


def _rows(program: Program) -> int:
    """Rows of a slice, by what one row keeps; a graph with a fixed batch takes all it needs."""
    row = sum(math.prod(shape_of(n)[1:]) for n in program.graph_module.graph.nodes if is_batched(n))
    signature = program.signature
    return min(max(_MOST_BYTES // (8 * max(row, 1)), 1, signature.min_batch), signature.max_batch)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Activations that a layer, or a product of two activations, reads as codes."""
    return [a for a in node.args[: 1 if is_layer(node) else 2] if isinstance(a, fx.Node)]


def _ranges(
    program: Program, layers: Sequence[Options], slices: Sequence[Sequence[Tensor]], ctx: Context
) -> dict[tuple[fx.Node, int], _Affine]:
    """Scale and zero point by (activation, bits), from the float values of the measurement batch."""
    wanted = {(a, i.act_bits) for o in layers for i in o.infos for a in _operands(o.node)}
    observers = {a: ActivationObserver() for a in dict.fromkeys(a for a, _ in wanted)}
    generator = ctx.generator(6)
    keep = -(-_KEEP // len(slices))
    for observer in observers.values():
        observer.kept.reserve(keep * len(slices))
    order = [n for n in program.graph_module.graph.nodes if n in observers]  # draws must not depend on a set's order
    for piece in slices:
        values = values_of(program, piece)
        for node in order:
            observers[node].update(values[node], keep, generator)
        del values
        ctx.progress.advance(1)
    return {(a, bits): observers[a].affine(act_spec(bits), a.name, ctx.config.recipe) for a, bits in wanted}


def _weight_scales(program: Program, layers: Sequence[Options]) -> dict[tuple[fx.Node, int], Tensor]:
    """Per-channel scales by (layer, bits); the codes themselves are made anew each time, to keep no copies of weights."""
    wanted = {(o.node, i.weight_bits) for o in layers if is_layer(o.node) for i in o.infos}
    found = {}
    for node, bits in wanted:
        spec = weight_spec(bits, weight_axis(node))
        found[node, bits] = search_weight(layer_weight(program, node), spec, candidates=_CANDIDATES)
    return found


def _rounded(weight: Tensor, node: fx.Node, bits: int, scale: Tensor) -> Tensor:
    spec = weight_spec(bits, weight_axis(node))
    return weight_codes(weight, scale, spec).float() * per_channel(scale, weight.dim(), spec.axis)


def _rounding(
    node: fx.Node,
    info: LayerInfo,
    ranges: dict[tuple[fx.Node, int], _Affine],
    scales: dict[tuple[fx.Node, int], Tensor],
) -> Rounding:
    """What a quantized layer computes with, in place of its float operands."""
    spec = act_spec(info.act_bits)

    def rounded(read: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        read = dict(read)
        for a in set(_operands(node)):
            scale, zero = ranges[a, info.act_bits]
            read[a] = dequantize(quantize(read[a], scale, zero, spec.qmin, spec.qmax), scale, zero)
        weight = weight_node(node) if is_layer(node) else None
        if weight is not None:
            read[weight] = _rounded(read[weight], node, info.weight_bits, scales[node, info.weight_bits])
        return read

    return rounded


def _weight_error(program: Program, node: fx.Node, info: LayerInfo, scales: dict[tuple[fx.Node, int], Tensor]) -> float:
    if not is_layer(node):
        return 0.0
    weight = layer_weight(program, node)
    error = (_rounded(weight, node, info.weight_bits, scales[node, info.weight_bits]) - weight).double().square().sum()
    energy = float(weight.double().square().sum())
    share = _positions(node) / math.prod(program.signature.inputs[0].shape[1:])
    return float(error) / energy * share if energy else 0.0


def _positions(layer: fx.Node) -> int:
    """Positions (pixels, tokens) per sample of a layer's output, or of what a vector is first spread over."""
    channels, node = shape_of(layer)[1 if len(shape_of(layer)) == 4 else -1], layer
    while True:
        shape = shape_of(node)
        tokens = len(shape) == 3 and shape[-1] == channels  # [B, T, C]; a vector on its way to an image is [B, C, 1]
        count = math.prod(shape[2:]) if len(shape) == 4 else shape[1] if tokens else 1
        if count > 1 or len(node.users) != 1:
            return count
        node = next(iter(node.users))
