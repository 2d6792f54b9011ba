"""Seconds of a compilation, stage by stage: what is to be computed over what this machine computes now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from edadm_compile.config import QuantConfig
from edadm_compile.driver.memory_estimate import Sampled
from edadm_compile.driver.outline import Outline
from edadm_compile.ir.arithmetic import layer_weights, multiplications
from edadm_compile.ir.footprint import kept_by
from edadm_compile.ir.program import Program
from edadm_compile.passes.calibrate import activation_quantizers
from edadm_compile.passes.layer_roles import quantized_layers
from edadm_compile.passes.sensitivity import measured_rows

#: Seconds of one measurement of the machine.
_MEASURED_FOR = 0.25
#: Elementwise operations: per weight and training step, per weight in the range search of calibrate and of assign_widths,
#: per value of an activation quantizer in inference and in training, and per observed value in a range search.
_STEP_OPS, _SEARCH_OPS, _COARSE_OPS, _QUANT_OPS, _TRAIN_OPS, _RANGE_OPS = 30, 80 * 7, 40 * 7, 6, 14, 512 * 5 * 40_000
#: The reference engine takes so many times a float evaluation.
_REFERENCE = 4.0
#: A backward pass with its forward pass takes so many forward passes.
_TRAINING = 3.0
#: Python's share of one call of an operator.
_CALL = 12e-6


@dataclass(frozen=True)
class Machine:
    """What this machine computes now, with the threads torch uses.

    Attributes:
        products: float32 multiplications a second in a 3x3 convolution.
        elements: elementwise operations on float32 values a second.
    """

    products: float
    elements: float


def measure_machine() -> Machine:
    """Time a convolution and elementwise operations for about half a second together."""
    x, w = torch.rand(1, 128, 32, 32), torch.rand(128, 128, 3, 3)
    y = torch.rand(1 << 18)
    with torch.no_grad():
        products = _rate(lambda: torch.nn.functional.conv2d(x, w, padding=1)) * w.numel() * 32 * 32
        elements = _rate(lambda: torch.clamp(torch.round(y * 3.0), -8.0, 7.0)) * 3 * y.numel()
    return Machine(products, elements)


def _rate(call: Callable[[], object]) -> float:
    """Calls a second."""
    call()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _MEASURED_FOR:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def time_estimate(
    outline: Outline, config: QuantConfig, sampled: Sampled, machine: Machine, captured: float
) -> dict[str, float]:
    """Seconds by stage.

    Args:
        captured: seconds that capture and the float passes took here.
    """
    forward, quantized = _forward(outline.floats, machine), _quantized(outline.quantized, machine)
    chunks = max(1, -(-sampled.collected // 64))
    share = (chunks + 1) / (2 * chunks)  # samples are sorted by step: each chunk stops at its last
    weights = layer_weights(quantized_layers(outline.quantized))
    quantizers = sum(1 for _ in activation_quantizers(outline.quantized))
    stages = {
        "capture": captured,
        "calibration": sampled.steps * (sampled.scored + share * sampled.collected) * forward,
        "widths": 0.0,
        "ranges": sampled.collected * forward + (weights * _SEARCH_OPS + quantizers * _RANGE_OPS) / machine.elements,
        "reconstruct": _reconstruct(outline, config, sampled, machine),
        "mean correction": sampled.steps * sampled.scored * quantized if config.recipe.mean_correction else 0.0,
        "quality": sampled.steps * sampled.quality * (1 + _REFERENCE) * forward,
    }
    if outline.measured:
        layers = len(quantized_layers(outline.quantized))
        rows = measured_rows(sampled.steps, sampled.scored, outline.floats.sampler.branches)
        stages["widths"] = (1 + layers / 2) * rows * forward + weights * _COARSE_OPS / machine.elements
    return stages


#: Stages of the estimate by the names of an earlier run's results.
_STAGES = {"calibration": "calibration", "assign_widths": "widths", "calibrate": "ranges",
           "mean_correction": "mean correction", "quality": "quality"}  # fmt: skip


def without_done(stages: Mapping[str, float], done: Sequence[str], blocks: int) -> dict[str, float]:
    """What is left of `stages` when an earlier run left the results `done`.

    Args:
        blocks: to reconstruct in all phases together.
    """
    finished = {_STAGES[name] for name in done if name in _STAGES}
    left = {name: 0.0 if name in finished else seconds for name, seconds in stages.items()}
    trained = sum(name.startswith("reconstruct.") for name in done)
    left["reconstruct"] *= 1 - trained / max(1, blocks)
    return left


def _forward(program: Program, machine: Machine) -> float:
    """Seconds of one row through a float program."""
    nodes = program.graph_module.graph.nodes
    return multiplications(nodes) / machine.products + kept_by(nodes) / 4 / machine.elements + _CALL * len(nodes) / 16


def _quantized(program: Program, machine: Machine) -> float:
    """The same through a fake_quant program."""
    values = kept_by(n for n, _ in activation_quantizers(program)) / 4
    return _forward(program, machine) + _QUANT_OPS * values / machine.elements


def _reconstruct(outline: Outline, config: QuantConfig, sampled: Sampled, machine: Machine) -> float:
    settings = config.reconstruction
    if settings.iters == 0 or not config.recipe.phases:
        return 0.0
    program = outline.quantized
    forward, quantized = _forward(program, machine), _quantized(program, machine)
    passes = sampled.collected * (2 * forward + quantized) + 2 * min(128, sampled.collected) * quantized
    inside = [n for unit in outline.units for n in unit.nodes]
    values = kept_by(n for n, _ in activation_quantizers(program)) / 4
    row = _TRAINING * (multiplications(inside) / machine.products + kept_by(inside) / 4 / machine.elements)
    row += _TRAIN_OPS * values / machine.elements
    step = settings.batch * row + layer_weights(inside) * _STEP_OPS / machine.elements + 40 * _CALL * len(inside) / 8
    return len(config.recipe.phases) * (passes + settings.iters * step)
