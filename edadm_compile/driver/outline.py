"""What a compilation would make, without its work: the graph goes through the passes, the weights do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edadm_compile.calibration.sampler import timesteps
from edadm_compile.config import QuantConfig
from edadm_compile.frontend import Source
from edadm_compile.ir.analysis import layer_weight
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import LayerInfo, Program, constants_of, get_constant, layer_of
from edadm_compile.ir.subgraph import Unit, find_units, output_of
from edadm_compile.ir.valueless import without_values
from edadm_compile.parallel.world import World
from edadm_compile.passes.assign_widths import AssignWidths, average_bits, promotes
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import activation_quantizers, weight_quantizers
from edadm_compile.passes.finite import check_parameters
from edadm_compile.passes.freeze import Freeze
from edadm_compile.passes.insert_quant import InsertQuant, weight_axis
from edadm_compile.passes.layer_roles import annotate, apply_rules, quantized_layers
from edadm_compile.passes.lower import Lower
from edadm_compile.passes.mean_correction import add_table
from edadm_compile.passes.mixed_widths import check_reachable, measurable
from edadm_compile.passes.other_shapes import carry
from edadm_compile.passes.row_shares import check_divisible
from edadm_compile.passes.rule_check import check_rules
from edadm_compile.pipeline import capture, compare_shapes, float_passes

#: Stand-ins of typical length for what only calibration finds; they are text in the file.
_SCALE, _ZERO_POINT = 0.03142, -17


@dataclass(frozen=True)
class Outline:
    """Programs without values, and what follows from their structure.

    Attributes:
        captured: nodes of the graph as it was captured.
        floats: the float program that is calibrated.
        quantized: the fake_quant program.
        units: its reconstruction units.
        qdq, lowered: as in the file.
        measured: whether measurement decides which layers get 8-bit weights; here the smallest ones have them.
        average_bits: of the weights.
        original: names of the constants of the graph as it was captured.
        others: qdq and lowered program of each further shape.
    """

    captured: int
    floats: Program
    quantized: Program
    units: Sequence[Unit]
    qdq: Program
    lowered: Program
    measured: bool
    average_bits: float
    original: frozenset[str]
    others: tuple[tuple[Program, Program], ...] = ()


def make_outline(
    source: Source, config: QuantConfig, program: Program | None = None, world: World | None = None
) -> Outline:
    """Capture a source, or take what was captured of it, and run the passes on shapes alone.

    Raises:
        EdadmError: what the compilation would be refused for after capture.
    """
    ctx = Context(config, world=world or World())
    program = capture(source) if program is None else program
    check_parameters(program)
    captured, original = len(program.graph_module.graph.nodes), frozenset(constants_of(program))
    floats = run_passes(without_values(program), float_passes(), ctx)
    check_rules(floats, config)
    check_reachable(floats, config)
    check_divisible(floats, ctx)
    changes = compare_shapes(source, floats, config, values=False)
    measured = _is_measured(floats, config)
    annotated = floats.fork()
    if measured:
        _expect_widths(annotated, config)
    else:
        annotated = run_passes(floats, [AssignWidths()], ctx)
    bits = average_bits(annotated)
    quantized = run_passes(annotated, [InsertQuant()], ctx)
    _expect_scales(quantized)
    outputs = _output_channels(quantized)
    corrected = quantized.fork()
    if config.recipe.mean_correction and outputs:
        keys = torch.tensor(timesteps(program.sampler), dtype=torch.float64).unique()
        corrected = add_table(corrected, keys, torch.zeros(keys.numel(), outputs))
    qdq = run_passes(corrected, [Freeze()], ctx)
    lowered = run_passes(qdq, [Lower()], ctx)
    units = find_units(quantized, config.reconstruction.max_layers)
    others = tuple(carry(qdq, change, config) for change in changes)
    return Outline(captured, floats, quantized, units, qdq, lowered, measured, bits, original, others)


def _is_measured(floats: Program, config: QuantConfig) -> bool:
    """Whether the widths of some layers follow from values."""
    if config.is_automatic:
        return True
    if not promotes(config):
        return False
    annotated = floats.fork()
    annotate(annotated, config)
    return measurable(annotated)


def _expect_widths(program: Program, config: QuantConfig) -> None:
    """8-bit weights for the smallest layers, up to the share that a measured choice may give them too."""
    annotate(program, config)
    layers = [(n, i) for n in quantized_layers(program) if (i := layer_of(n)) is not None]
    total = sum(_size(i) for _, i in layers)
    share = config.promoted_share if config.budget_bits is None else (config.budget_bits - 4) / 4
    wide = sum(_size(i) for _, i in layers if i.role in ("stem", "head"))
    for node, info in sorted(layers, key=lambda pair: (_size(pair[1]), pair[1].name)):
        if info.role in ("inner", "conditioning") and wide + _size(info) <= share * total:
            wide += _size(info)
            note = "one of the smallest; measurement decides"
            node.meta["layer"] = replace(info, weight_bits=8, act_bits=max(8, info.act_bits), note=note)
    apply_rules(program, config.rules)


def _size(info: LayerInfo) -> int:
    return math.prod(info.weight_shape)


def _expect_scales(program: Program) -> None:
    """Any scale for each quantizer, and records of convolution outputs of typical length."""
    for node, quantizer in activation_quantizers(program):
        channels = node.meta["shape"][1] if node.meta.get("output_quantizer") else 0
        shape = (channels, 1, 1) if channels else (1,)
        quantizer.set_affine(torch.full(shape, _SCALE), torch.zeros(shape))
    for node, weight_quantizer in weight_quantizers(program):
        weight = get_constant(program.graph_module, str(node.args[0].target))  # type: ignore[union-attr]
        weight_quantizer.set_scale(torch.full((weight.shape[weight_quantizer.spec.axis or 0],), _SCALE))
    for node in program.graph_module.graph.nodes:
        info = layer_of(node)
        if info is not None and writes_codes(node, info) and output_of(node) is pixels_of(node):
            channels = layer_weight(program, node).shape[weight_axis(node)]
            node.meta["layer"] = replace(info, out_scale=(_SCALE,) * channels, out_zero_point=(_ZERO_POINT,) * channels)


def _output_channels(program: Program) -> int:
    """Channels of an image-shaped prediction, 0 for any other."""
    value: Any = program.graph_module.graph.output_node().args[0]
    shape = value.meta.get("shape", ())
    return int(shape[1]) if len(shape) == 4 else 0
