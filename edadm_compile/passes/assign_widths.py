"""Decide the width of every layer: by role, by the user's rules, and by measured sensitivity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from edadm_compile.config import QuantConfig
from edadm_compile.ir.analysis import layer_weight, shape_of
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.checkpoint import Saved
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.passes.layer_roles import annotate, apply_rules, quantized_layers
from edadm_compile.passes.mixed_widths import choose_widths
from edadm_compile.passes.records import layer_records, set_layer_records
from edadm_compile.passes.sensitivity import MEASURE_LIMIT, sensitivities

#: Promotion stops when the predicted signal-to-noise ratio of the remaining weights passes this (dB).
_TARGET_DB = 40.0


@dataclass(frozen=True)
class AssignWidths:
    """Annotates a float graph; changes no operator.

    1. layer that reads x (stem) → W8, its input 16-bit (8-bit when uniform or baseline)
    2. layer that writes the output (head) → W8A8
    3. layer of the time path that was not folded, or without an integer lowering → float, with the reason
    4. every other layer → the requested widths
    5. below 8 bits, unless uniform: layers whose rounding hurts the output most per stored bit → W8, inputs at least
       A8, while all 8-bit layers together hold at most ``promoted_share`` of the parameters
    6. with ``budget_bits`` or ``min_sqnr``, instead of 5: W8 and inputs of at least A8 for the layers that
       `mixed_widths.choose_widths` picks
    7. the user's rules, last
    """

    name: str = "assign_widths"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Annotate every layer and every float product."""
        config = ctx.config
        annotate(program, config)
        stats: dict[str, Any] = {}
        if config.is_automatic:
            stats = {"mixed": choose_widths(program, ctx)}
        elif promotes(config):
            stats = _promote(program, ctx)
        apply_rules(program, config.rules)
        return PassResult(program, True, {**stats, "average_bits": average_bits(program)})

    def state(self, program: Program) -> Saved:
        """The layer records."""
        return Saved(values={"layers": layer_records(program)})

    def restore(self, program: Program, saved: Saved) -> Program:
        """Write the layer records back."""
        set_layer_records(program, saved.values["layers"])
        return program


def promotes(config: QuantConfig) -> bool:
    """Whether rule 5 applies."""
    return not config.uniform and config.recipe.edges and min(config.weight_bits, config.act_bits) < 8


def average_bits(program: Program) -> float:
    """Average weight width over the quantized layers, weighted by parameters."""
    infos = [i for n in quantized_layers(program) if (i := layer_of(n))]
    total = sum(math.prod(i.weight_shape) for i in infos)
    return sum(math.prod(i.weight_shape) * i.weight_bits for i in infos) / total if total else 0.0


def _wide_share(program: Program, promoted: list[str]) -> float:
    """Share of the parameters in layers that are 8 bits wide by role or by promotion."""
    infos = [i for n in quantized_layers(program) if (i := layer_of(n))]
    wide = [i for i in infos if i.role in ("stem", "head") or i.name in promoted]
    return sum(math.prod(i.weight_shape) for i in wide) / sum(math.prod(i.weight_shape) for i in infos)


def _promote(program: Program, ctx: Context) -> dict[str, Any]:
    config = ctx.config
    candidates = [n for n in quantized_layers(program) if (i := layer_of(n)) and i.role in ("inner", "conditioning")]
    size = sum(layer_weight(program, n).numel() for n in candidates)
    measured = size <= MEASURE_LIMIT
    if measured:
        errors, signal = sensitivities(program, candidates, config.weight_bits if config.weight_bits < 8 else 4, ctx)
    else:
        errors, signal = {n: 1.0 for n in candidates if at_input_resolution(program, n)}, 0.0
    ranked = sorted(errors, key=lambda n: (-errors[n] / layer_weight(program, n).numel(), n.name))
    remaining = sum(errors.values())
    promoted: list[str] = []
    for node in ranked:
        if measured and remaining <= signal * 10 ** (-_TARGET_DB / 10):
            break
        info = layer_of(node)
        assert info is not None
        note = "promoted: most output error per bit" if measured else "promoted: works at the input resolution"
        node.meta["layer"] = replace(info, weight_bits=8, act_bits=max(8, info.act_bits), note=note)
        if _wide_share(program, promoted=[*promoted, info.name]) > config.promoted_share:
            node.meta["layer"] = info
            continue
        remaining -= errors[node]
        promoted.append(info.name)
    names = {layer_name(n): errors[n] / signal if signal else None for n in ranked}
    return {"promoted": promoted, "measured": measured, "sensitivity": names}


def at_input_resolution(program: Program, node: fx.Node) -> bool:
    """Whether a convolution reads or writes the resolution of x (includes the first downsampling convolution)."""
    size = program.signature.inputs[0].shape[1:]
    source = node.args[0]
    return any(isinstance(n, fx.Node) and shape_of(n)[2:] == size for n in (node, source)) and len(size) == 2
