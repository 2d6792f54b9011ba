"""Peak memory of a compilation, stage by stage, from shapes (benchmarks/families/memory.py compares it with measurements)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from edadm_compile.config import QuantConfig
from edadm_compile.driver.outline import Outline
from edadm_compile.ir.analysis import is_batched, shape_of
from edadm_compile.ir.arithmetic import layer_weights
from edadm_compile.ir.footprint import MOST_BYTES, Footprint, rows_at_once, rows_within, value_bytes
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.ir.subgraph import Unit
from edadm_compile.passes.calibrate import KEPT, activation_quantizers, kept_of_batch, observed_together
from edadm_compile.passes.float_outputs import candidates, measurable
from edadm_compile.passes.layer_roles import quantized_layers
from edadm_compile.passes.output_ranges import KEEP
from edadm_compile.passes.reconstruct import KEPT_BY_QUANTIZER, STEP_BYTES, training_bytes
from edadm_compile.passes.sensitivity import measured_rows, rows_together
from edadm_compile.passes.streams import Streams

#: Interpreter, torch, diffusers and what torch.export leaves, before any weight: measured on Linux, torch 2.13.
_RUNTIME = 560 << 20
#: What a node of a graph and its copies in the passes take.
_NODE = 72 << 10
#: Blocks of this size and more glibc takes from the system one by one and gives back at once.
_MAPPED = 32 << 20
#: Blocks below that lie in a heap with gaps: while values of changing sizes come and go it grows to about twice what they
#: take at a time, because an aligned block seldom fits into the gap of another of its size (glibc bug 14581).
_GAPS = 2.0
#: Copies of a quantizer's sample in the search of its range: candidates of a piece, and their tensors at a time.
_IN_SEARCH = 32 * 3
#: Tensors of a weight's size while its rounding is learned: alpha, its gradient, Adam's two moments, the soft weight.
_PER_WEIGHT = 5.0
#: Tensors of a quantizer's size beside its result while it runs.
_IN_QUANTIZER = 2.0
#: Gradients of the size of the largest value, and what the backward pass computes them from.
_IN_BACKWARD = 3.0


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
    floats, quantized = Footprint(outline.floats), Footprint(outline.quantized)
    codes = layer_weights(quantized_layers(outline.quantized))
    training, spilled = _reconstructing(outline, quantized, config, sampled, limit)
    stages = {
        "calibration samples": held + _collecting(outline.floats, floats, sampled),
        "widths": held + _sensitivity(outline, floats, sampled),
        "output codes": held + _output_codes(outline, floats, config, sampled),
        "ranges": held + _observing(outline, floats, sampled.collected),
        "reconstruct": held + training,
        "mean correction": held + codes + _forward(outline.quantized, quantized, sampled.scored),
        "quality": held + file + _quality(outline, sampled),
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


def _taken(rows: float) -> Callable[[float], float]:
    """What the process grows by for a block of so many bytes per row."""
    return lambda size: rows * size * (1.0 if rows * size >= _MAPPED else _GAPS)


def _forward(program: Program, footprint: Footprint, rows: int) -> float:
    """Bytes of the values of a forward, each freed after its last reader."""
    rows = rows_at_once(program, MOST_BYTES, rows)
    return footprint.peak_of(list(program.graph_module.graph.nodes), _scratch, _taken(rows))


def _scratch(node: fx.Node) -> float:
    """Bytes per row that an operator takes beside its result: a convolution its input with the channels last."""
    if node.op == "call_module" and is_batched(node):
        return _IN_QUANTIZER * value_bytes(node)
    if node.op == "call_function" and "conv" in op_name(node.target):
        return value_bytes(node.all_input_nodes[0])
    return 0.0


def _collecting(program: Program, footprint: Footprint, sampled: Sampled) -> float:
    states = value_bytes(next(iter(program.graph_module.graph.nodes)))
    stored = 2 * states * sampled.steps * sampled.scored + states * sampled.collected
    return stored + _forward(program, footprint, max(sampled.scored, min(64, sampled.collected)))


def _sensitivity(outline: Outline, footprint: Footprint, sampled: Sampled) -> float:
    return _measuring(outline.floats, footprint, sampled) if outline.measured else 0.0


def _output_codes(outline: Outline, footprint: Footprint, config: QuantConfig, sampled: Sampled) -> float:
    nodes = candidates(outline.quantized, config)
    if not nodes or not measurable(outline.quantized, nodes):
        return 0.0
    rows = measured_rows(sampled.steps, sampled.scored, outline.floats.sampler.branches)
    return _measuring(outline.floats, footprint, sampled) + 4.0 * _channel_values(nodes, KEEP, rows)


def _measuring(program: Program, footprint: Footprint, sampled: Sampled) -> float:
    """All float values of a measurement batch, and the changed ones behind a layer, each until its last reader."""
    together = rows_together(program, measured_rows(sampled.steps, sampled.scored, program.sampler.branches))
    nodes = list(program.graph_module.graph.nodes)
    return footprint.total * together + footprint.peak_of(nodes, _scratch, _taken(together))


def _observing(outline: Outline, footprint: Footprint, total: int) -> float:
    """Samples of what is quantized, and beside them a forward, or the search of a range."""
    program, chunk = outline.quantized, observed_together(outline.quantized)
    rows, batches = min(chunk, total), -(-total // chunk)
    each = kept_of_batch(KEPT, chunk, total)
    samples = [min(each, rows * value_bytes(n) / 4) * batches for n, _ in activation_quantizers(program)]
    codes = [n for n in program.graph_module.graph.nodes if writes_codes(n, layer_of(n))]
    kept = sum(samples) + _channel_values(codes, kept_of_batch(KEEP, chunk, total), rows) * batches
    search = _taken(4.0)(_IN_SEARCH * max(samples, default=0.0))
    return 4.0 * kept + max(_forward(outline.floats, footprint, rows), search)


def _channel_values(nodes: Iterable[fx.Node], each: int, rows: int) -> float:
    """Values kept of the outputs of convolutions: `each` of a channel, or all that a batch of `rows` has."""
    shapes = [shape_of(pixels_of(n)) for n in nodes]
    return float(sum(shape[1] * min(each, rows * math.prod(shape[2:])) for shape in shapes))


def _quality(outline: Outline, sampled: Sampled) -> float:
    program = outline.lowered
    rows = rows_at_once(program, MOST_BYTES, sampled.quality)
    return Footprint(program).peak_of(list(program.graph_module.graph.nodes), _patches, _taken(rows))


def _patches(node: fx.Node) -> float:
    """Bytes per row that the reference convolution gathers: the patches twice, and int32 and float accumulators."""
    if node.op != "call_function" or "qconv" not in str(node.target):
        return 0.0
    weight: Any = node.args[10 if "transpose" not in str(node.target) else 11]
    pixels = math.prod(shape_of(node)[2:])
    return float(pixels * (2.0 * math.prod(weight[1:]) + 8.0 * weight[0]))


def _reconstructing(
    outline: Outline, footprint: Footprint, config: QuantConfig, sampled: Sampled, limit: int | None
) -> tuple[float, float]:
    """Most bytes in memory, above weights and runtime, and in files while the units are trained one after the other."""
    program, rows = outline.quantized, sampled.collected
    streams = Streams(program, outline.units, _empty_inputs(program))
    # The largest chunk that a run takes follows from the closures alone.
    chunk = min(streams.chunk, rows)
    most = codes = spilled = 0.0
    stored = getattr(torch, config.reconstruction.target_dtype).itemsize / 4
    for step, closure, live in streams.stations():
        cached = 2 * sum(value_bytes(n) for n in live) * rows
        inside = footprint.peak_of(closure, _scratch, _taken(chunk))
        if isinstance(step, Unit):
            watched = [n for n in step.layers if n is not step.output and config.recipe.layer_loss_weight]
            targets = [value_bytes(n) * rows for n in (step.output, *watched) if is_batched(n)]
            cached += stored * sum(targets) + max(targets, default=0.0)  # with the squares of one for its mean
            weights = 4.0 * layer_weights(step.layers)
            inside = max(inside, _training(program, closure, config.reconstruction.batch) + _PER_WEIGHT * weights)
            codes += weights / 4
        kept = cached if limit is None else min(cached, limit)
        most, spilled = max(most, codes + kept + inside), max(spilled, cached - kept)
    return most, spilled


def _training(program: Program, closure: Sequence[fx.Node], batch: int) -> float:
    """What a training step keeps for its gradients, and the gradients of the largest value."""
    per_row = training_bytes(program, closure)
    taken = _taken(rows_within(STEP_BYTES, per_row, batch))
    largest = max(value_bytes(n) for n in closure)
    quantizers = [n for n in closure if n.op == "call_module" and is_batched(n)]
    kept = sum(taken(value_bytes(n)) for n in closure) + KEPT_BY_QUANTIZER * sum(
        taken(value_bytes(n)) for n in quantizers
    )
    return kept + _IN_BACKWARD * taken(largest)


def _empty_inputs(program: Program) -> list[torch.Tensor]:
    size = program.signature.max_batch if program.signature.min_batch == program.signature.max_batch else 1
    return [torch.zeros((size, *s.shape), dtype=s.dtype) for s in program.signature.inputs]
