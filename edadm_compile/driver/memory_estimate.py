"""Peak memory of a compilation, stage by stage, from shapes (benchmarks/families/memory.py compares it with measurements)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edadm_compile.config import QuantConfig
from edadm_compile.driver.outline import Outline
from edadm_compile.ir.analysis import is_batched, shape_of
from edadm_compile.ir.arithmetic import layer_weights
from edadm_compile.ir.footprint import MOST_BYTES, Footprint, kept_by, rows_at_once, rows_within, value_bytes
from edadm_compile.ir.program import Program
from edadm_compile.ir.subgraph import Unit
from edadm_compile.passes.calibrate import activation_quantizers
from edadm_compile.passes.layer_roles import quantized_layers
from edadm_compile.passes.reconstruct import STEP_BYTES, training_bytes
from edadm_compile.passes.sensitivity import MOST_BYTES as SENSITIVITY_BYTES
from edadm_compile.passes.sensitivity import measured_rows
from edadm_compile.passes.streams import Streams

#: Interpreter, torch, diffusers and what torch.export leaves, before any weight: measured on Linux, torch 2.13.
_RUNTIME = 640 << 20
#: What a node of a graph and its copies in the passes take.
_NODE = 24 << 10
#: The allocator keeps some of what values of changing sizes gave back. What the forward of the range search took stays with it:
#: the values that the search keeps lie above.
_SLACK = 1.12
#: Float values kept for the range search of one quantizer.
_OBSERVED = 40_000 * 4
#: Tensors of a weight's size while its rounding is learned: alpha, its gradient, Adam's two moments, the soft weight.
_PER_WEIGHT = 5.0


@dataclass(frozen=True)
class Sampled:
    """Rows that calibration runs.

    Attributes:
        steps: calls of the model in one trajectory.
        scored: rows of the scoring batch.
        collected: rows of the calibration set.
        quality: rows of the closing measurement.
    """

    steps: int
    scored: int
    collected: int
    quality: int


def memory_estimate(
    outline: Outline,
    config: QuantConfig,
    sampled: Sampled,
    weights: int,
    added: int,
    file: int,
    limit: int | None = None,
) -> dict[str, Any]:
    """Bytes by stage and their largest sum.

    Args:
        weights: bytes of the source's parameters in memory.
        added: bytes of constants that the float passes made.
        file: expected size of the file.
        limit: most bytes of caches in memory.

    Returns:
        peak, and its stage; runtime and weights, which every stage has; stages; spilled: most bytes of caches on disk.
    """
    base = _RUNTIME + _NODE * outline.captured
    held = base + weights + added
    left = _forward(outline.floats, min(64, sampled.collected))
    codes = layer_weights(quantized_layers(outline.quantized))
    training, spilled = _reconstructing(outline, config, sampled, limit)
    stages = {
        "calibration samples": held + _SLACK * _collecting(outline.floats, sampled),
        "widths": held + _SLACK * _sensitivity(outline, config, sampled),
        "ranges": held + _SLACK * _observing(outline, sampled),
        "reconstruct": held + left + training,
        "mean correction": held + left + codes + _SLACK * _forward(outline.quantized, sampled.scored),
        "quality": held + left + file + _SLACK * _quality(outline, sampled),
        "file": held + 4 * file,
    }
    if config.reconstruction.iters == 0 or not config.recipe.phases:
        stages.pop("reconstruct")
        stages["mean correction"] -= codes
        spilled = 0.0
    if not config.recipe.mean_correction:
        stages.pop("mean correction")
    name = max(stages, key=lambda k: stages[k])
    return {
        "peak": round(stages[name]),
        "stage": name,
        "runtime": base,
        "weights": weights + added,
        "stages": {k: round(v) for k, v in stages.items()},
        "spilled": round(spilled),
    }


def _forward(program: Program, rows: int) -> float:
    return Footprint(program).peak * rows_at_once(program, MOST_BYTES, rows)


def _collecting(program: Program, sampled: Sampled) -> float:
    states = value_bytes(next(iter(program.graph_module.graph.nodes)))
    stored = 2 * states * sampled.steps * sampled.scored + states * sampled.collected
    return stored + _forward(program, max(sampled.scored, min(64, sampled.collected)))


def _sensitivity(outline: Outline, config: QuantConfig, sampled: Sampled) -> float:
    if not outline.measured:
        return 0.0
    print_ = Footprint(outline.floats)
    rows = measured_rows(sampled.steps, sampled.scored, outline.floats.sampler.branches)
    kept = kept_by(outline.floats.graph_module.graph.nodes)
    together = rows_within(SENSITIVITY_BYTES, 2 * kept, rows)
    return 2 * print_.total * together


def _observing(outline: Outline, sampled: Sampled) -> float:
    quantizers = sum(1 for _ in activation_quantizers(outline.quantized))
    return quantizers * _OBSERVED + _forward(outline.floats, min(64, sampled.collected))


def _quality(outline: Outline, sampled: Sampled) -> float:
    program = outline.lowered
    rows = rows_at_once(program, MOST_BYTES, sampled.quality)
    patches = max((_patches(n) for n in program.graph_module.graph.nodes), default=0.0)
    return (Footprint(program).peak + patches) * rows


def _patches(node: fx.Node) -> float:
    """Bytes per row that the reference convolution gathers: the patches twice, and int32 and float accumulators."""
    if node.op != "call_function" or "qconv" not in str(node.target):
        return 0.0
    weight: Any = node.args[10 if "transpose" not in str(node.target) else 11]
    pixels = math.prod(shape_of(node)[2:])
    return float(pixels * (2.0 * math.prod(weight[1:]) + 8.0 * weight[0]))


def _reconstructing(outline: Outline, config: QuantConfig, sampled: Sampled, limit: int | None) -> tuple[float, float]:
    """Most bytes in memory, above weights and runtime, and in files while the units are trained one after the other."""
    program, rows = outline.quantized, sampled.collected
    streams = Streams(program, outline.units, _empty_inputs(program))
    # The largest chunk that a run takes follows from the closures alone.
    chunk = min(streams.chunk, rows)
    most = codes = spilled = 0.0
    stored = getattr(torch, config.reconstruction.target_dtype).itemsize / 4
    for step, closure, live in streams.stations():
        cached = 2 * sum(value_bytes(n) for n in live) * rows
        inside = kept_by(closure) * chunk
        if isinstance(step, Unit):
            watched = [n for n in step.layers if n is not step.output and config.recipe.layer_loss_weight]
            targets = [value_bytes(n) * rows for n in (step.output, *watched) if is_batched(n)]
            cached += stored * sum(targets) + max(targets, default=0.0)  # with the squares of one for its mean
            per_row = training_bytes(program, closure)
            batch = rows_within(STEP_BYTES, per_row, config.reconstruction.batch)
            weights = 4.0 * layer_weights(step.layers)
            inside = max(inside, per_row * batch + _PER_WEIGHT * weights)
            codes += weights / 4
        kept = cached if limit is None else min(cached, limit)
        most, spilled = max(most, codes + _SLACK * (kept + inside)), max(spilled, cached - kept)
    return most, spilled


def _empty_inputs(program: Program) -> list[torch.Tensor]:
    size = program.signature.max_batch if program.signature.min_batch == program.signature.max_batch else 1
    return [torch.zeros((size, *s.shape), dtype=s.dtype) for s in program.signature.inputs]
