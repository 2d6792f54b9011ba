"""Automatic mixed precision: 8-bit layers where they pay most, by measured errors and integer programming.

The predicted error of an assignment is the sum of the errors of its layers, each measured with the rest in float. That is
exact when the layers' errors are small and uncorrelated; the report holds the measured figure beside the predicted one.
Storage knows two weight widths, 4 and 8 bits, so that a layer has two options. Activations are codes of one byte whatever
their width: nothing is saved by narrower ones, and their width stays the requested one (at least 8 in front of 8-bit weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edadm_compile.config import QuantConfig
from edadm_compile.errors import ConfigError
from edadm_compile.ir.program import LayerInfo, Program, layer_of
from edadm_compile.passes.base import Context
from edadm_compile.passes.layer_errors import Options, layer_errors, weight_errors
from edadm_compile.passes.layer_roles import annotate, quantized_layers, ruled
from edadm_compile.passes.sensitivity import MEASURE_LIMIT
from edadm_compile.passes.width_program import Choice, least_bits, least_error, smallest, total_bits, total_error
from edadm_compile.quant.packing import storage_bits

#: Points of the reported curve, evenly spread from the smallest to the largest size.
_POINTS = 9


def choose_widths(program: Program, ctx: Context) -> dict[str, Any]:
    """Pick the widths of every layer of an annotated program and write them into the records.

    Returns:
        the report (docs/quantization.md, section 7): budget, stored bits, predicted SQNR, layers, curve.

    Raises:
        ConfigError: a budget or an SQNR that no assignment reaches; says the nearest that one does.
    """
    config = ctx.config
    check_reachable(program, config)
    layers = options_of(program, config)
    if measurable(program):
        errors, signal = layer_errors(program, layers, ctx)
    else:
        errors, signal = weight_errors(program, layers, ctx), 0.0
    choices = [Choice(e, tuple(map(_stored, o.infos))) for o, e in zip(layers, errors, strict=True)]
    parameters = _parameters(layers)
    picked = _pick(choices, parameters, signal, config)
    for options, option in zip(layers, picked, strict=True):
        info = layer_of(options.node)
        if option and info is not None:
            options.node.meta["layer"] = _wide(info)  # without the rules, which the pass applies last
    return {
        "budget_bits": config.budget_bits,
        "min_sqnr": config.min_sqnr,
        "measured": signal > 0,
        "stored_bits": total_bits(choices, picked) / parameters,
        "predicted_sqnr": _decibel(total_error(choices, picked), signal),
        "layers": [_row(o, c, k, signal) for o, c, k in zip(layers, choices, picked, strict=True)],
        "curve": _curve(choices, parameters, signal),
    }


def check_reachable(program: Program, config: QuantConfig) -> None:
    """Refuse a request that no measurement could fulfil; `program` is a float graph, annotated or not.

    Raises:
        ConfigError: a budget below the smallest size, or an SQNR for a model that is too large to be measured.
    """
    if not config.is_automatic:
        return
    program = program.fork()
    annotate(program, config)
    if config.min_sqnr is not None and not measurable(program):
        raise ConfigError(
            f"min_sqnr = {config.min_sqnr} needs a measured sensitivity, and this model has more than "
            f"{MEASURE_LIMIT:,} parameters, above which none is measured; give budget_bits instead"
        )
    layers = options_of(program, config)
    parameters = _parameters(layers)
    if not parameters:
        raise ConfigError(
            "budget_bits and min_sqnr: no layer of this model runs in integers, there is nothing to choose"
        )
    least = sum(min(map(_stored, o.infos)) for o in layers) / parameters
    if config.budget_bits is not None and config.budget_bits < least:
        raise ConfigError(
            f"budget_bits: got {config.budget_bits}, the smallest that this model reaches is {_up(least)}: its first and "
            "last layers, and those with a rule for 5 to 8 bits, are stored in 8 bits"
        )


def measurable(program: Program) -> bool:
    """Whether the layers that have a choice are small enough for one forward each."""
    return sum(_size(i) for n in quantized_layers(program) if (i := layer_of(n)) and _is_free(i)) <= MEASURE_LIMIT


def options_of(program: Program, config: QuantConfig) -> list[Options]:
    """What each quantized layer and product of an annotated program could be under the rules, in graph order."""
    found = []
    for node in program.graph_module.graph.nodes:
        info = layer_of(node)
        if info is None or info.act_bits == 32:
            continue
        narrow, wide = ruled(info, config.rules), ruled(_wide(info), config.rules)
        if narrow.act_bits < 32:
            same = _label(narrow) == _label(wide)
            found.append(Options(node, (narrow,) if same else (narrow, wide)))
    return found


def _wide(info: LayerInfo) -> LayerInfo:
    if not _is_free(info):
        return info
    return replace(
        info, weight_bits=8, act_bits=max(8, info.act_bits), note="chosen for 8 bits: pays most in this size"
    )


def _is_free(info: LayerInfo) -> bool:
    return bool(info.weight_shape) and info.role in ("inner", "conditioning")


def _pick(choices: list[Choice], parameters: int, signal: float, config: QuantConfig) -> list[int]:
    if config.min_sqnr is None:
        assert config.budget_bits is not None
        picked = least_error(
            choices, math.floor(config.budget_bits * parameters + 1e-3)
        )  # not one bit less by rounding
    else:
        picked = least_bits(choices, signal * 10 ** (-config.min_sqnr / 10))
    if picked is None:
        best = sum(min(c.errors) for c in choices)
        size = total_bits(choices, least_bits(choices, best * (1 + 1e-9)) or []) / parameters
        raise ConfigError(
            f"min_sqnr: got {config.min_sqnr} dB, the highest that widths of 4 and 8 bits are predicted to reach is "
            f"{math.floor(100 * (_decibel(best, signal) or 0)) / 100} dB, at {size:.2f} stored bits per weight; "
            "ask for less, or for wider activations"
        )
    return picked


def _curve(choices: list[Choice], parameters: int, signal: float) -> list[dict[str, float | None]]:
    """Best predicted SQNR at a few sizes, each with the bits it really takes."""
    low, high = smallest(choices), sum(max(c.bits) for c in choices)
    points = []
    for k in range(_POINTS):
        picked = least_error(choices, low + (high - low) * k // (_POINTS - 1))
        assert picked is not None
        bits = total_bits(choices, picked) / parameters
        points.append({"bits": bits, "predicted_sqnr": _decibel(total_error(choices, picked), signal)})
    return points


def _row(options: Options, choice: Choice, picked: int, signal: float) -> dict[str, Any]:
    labels = [_label(i) for i in options.infos]
    return {
        "layer": options.name,
        "parameters": _size(options.infos[0]),
        "widths": labels[picked],
        "fixed": len(labels) == 1,
        "errors": {label: e / signal if signal else e for label, e in zip(labels, choice.errors, strict=True)},
    }


def _label(info: LayerInfo) -> str:
    return f"w{info.weight_bits}a{info.act_bits}"


def _size(info: LayerInfo) -> int:
    return math.prod(info.weight_shape) if info.weight_shape else 0


def _stored(info: LayerInfo) -> int:
    return _size(info) * storage_bits(info.weight_bits)


def _parameters(layers: Sequence[Options]) -> int:
    return sum(_size(o.infos[0]) for o in layers)


def _decibel(error: float, signal: float) -> float | None:
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else None


def _up(value: float) -> float:
    return math.ceil(value * 1000) / 1000
