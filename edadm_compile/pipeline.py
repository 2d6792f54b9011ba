"""The compiler's main line: which passes run, in which order, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edadm_compile.calibration import sampler
from edadm_compile.calibration.collect import collect
from edadm_compile.calibration.sampler import in_pieces
from edadm_compile.config import QuantConfig
from edadm_compile.evaluate.compare import NoiseComparison, compare_noise
from edadm_compile.frontend import Source
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.footprint import MOST_BYTES, rows_at_once
from edadm_compile.ir.program import Program
from edadm_compile.kernels import reference as _reference  # registers the operators' meaning  # noqa: F401
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context, Pass, Progress, Silent, run_passes
from edadm_compile.passes.calibrate import Calibrate
from edadm_compile.passes.canonicalize import Canonicalize
from edadm_compile.passes.decompose_attention import DecomposeAttention
from edadm_compile.passes.float_outputs import FloatOutputs
from edadm_compile.passes.fold_attention import FoldAttention
from edadm_compile.passes.freeze import Freeze
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.lower import Lower
from edadm_compile.passes.mean_correction import MeanCorrection
from edadm_compile.passes.mixed_widths import check_reachable
from edadm_compile.passes.reconstruct import Reconstruct
from edadm_compile.passes.sensitivity import MEASURE_LIMIT
from edadm_compile.passes.split_concat import SplitConcat
from edadm_compile.passes.time_tables import FoldTimePath
from edadm_compile.passes.trace import trace
from edadm_compile.passes.upsample_phases import UpsamplePhases

#: Fresh trajectories for the closing quality figure.
QUALITY_TRAJECTORIES = 16


def float_passes() -> list[Pass]:
    """Passes before calibration data exists."""
    return [
        Canonicalize(),  # first: later passes match one spelling only
        FoldTimePath(),  # before calibration and quantization: folded layers need neither
        SplitConcat(),  # before quantizers: each source of a concatenation gets its own
        UpsamplePhases(),  # before quantizers: the weights of the phases are what is quantized
        FoldAttention(),  # before attention is decomposed: it matches the undivided form
        DecomposeAttention(),  # before quantizers: exposes the operands of the two products
    ]


def quant_passes() -> list[Pass]:
    """Passes that need the calibration set; the last two need no data but need learned codes."""
    return [
        AssignWidths(),  # on the float graph: sensitivity compares with exact values
        FloatOutputs(),  # after widths: it looks at quantized layers only; before quantizers: it compares with exact values
        InsertQuant(),
        Calibrate(),  # before reconstruction: it starts from searched ranges
        Reconstruct(),
        MeanCorrection(),  # after reconstruction: corrects what is left
        Freeze(),  # codes are final from here on
        Lower(),
    ]


@dataclass(frozen=True)
class CompileResult:
    """What a compilation produced.

    Attributes:
        qdq: engine-neutral program with integer constants.
        lowered: program of integer operators.
        config: settings used.
        stats: results of each pass by name.
        seconds: wall time by stage.
        quality: noise-prediction error of the lowered program against the float model on fresh noise.
        allocation: calibration samples per sampler step.
        float_bytes: size of the source's parameters in fp16.
    """

    qdq: Program
    lowered: Program
    config: QuantConfig
    stats: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    quality: NoiseComparison | None
    allocation: list[int]
    float_bytes: int = 0
    source: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        quality = "not measured" if self.quality is None else f"{self.quality.sqnr:.1f} dB"
        return f"CompileResult({self.config.name}, {self.config.method}, SQNR {quality}, {sum(self.seconds.values()):.0f} s)"


def capture(source: Source) -> Program:
    """Trace a source and bring it to the canonical float program, ready for calibration."""
    exported, signature = source.export()
    program = trace(exported, signature, source.sampler, source.module, source.fixed)
    return program


def compile_source(
    source: Source,
    config: QuantConfig,
    progress: Progress | None = None,
    *,
    quality: bool = True,
    dump: Callable[[str, Program], None] | None = None,
) -> CompileResult:
    """Compile a loaded source with a configuration.

    Args:
        progress: receives stages and steps; silent by default.
        quality: measure the result against the float model on fresh noise at the end.
        dump: called with each pass's name and program.

    Raises:
        EdadmError: see `edadm_compile.errors`.
    """
    ctx = Context(config, progress=progress or Silent())
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    torch.manual_seed(config.seed)  # nothing draws from the global generator, schedulers of other people might
    ctx.progress.stage("capture", None)
    program = capture(source)
    program = run_passes(program, float_passes(), ctx, dump)
    check_reachable(program, config)  # before the expensive part: what is out of reach here stays so
    clock.mark("capture")
    ctx.progress.stage("calibration samples", _evaluations(program, config))
    ctx.calibration = collect(program, config, ctx.generator(1), pool=source.conditions, advance=ctx.progress.advance)
    clock.mark("calibration")
    result = program
    for item in quant_passes():
        result = run_passes(result, [item], ctx, dump)
        if item.name == "freeze":
            qdq = result
        clock.mark(item.name)
    verify(qdq)
    measured = _quality(program, result, source, ctx) if quality else None
    clock.mark("quality")
    counts = ctx.calibration.allocation.counts.tolist()
    return CompileResult(
        qdq, result, config, ctx.stats, seconds, measured, counts, source.parameter_bytes(), source.provenance()
    )


def _evaluations(program: Program, config: QuantConfig) -> int:
    """Upper bound of model evaluations (rows) during calibration, for the progress bar."""
    calls = len(sampler.timesteps(program.sampler)) * program.sampler.branches
    return calls * (config.tdac.trajectories + config.calib_samples)


def _quality(program: Program, lowered: Program, source: Source, ctx: Context) -> NoiseComparison:
    generator = ctx.generator(3)
    n = QUALITY_TRAJECTORIES
    if source.parameters() > MEASURE_LIMIT:  # no more than were afforded before
        n = min(n, ctx.config.tdac.trajectories)
    x = sampler.draw_noise(program.signature, n, generator)
    conditions = sampler.draw_conditions(program.signature, n, generator, source.conditions, program.sampler.null)
    ctx.progress.stage("quality", len(sampler.timesteps(program.sampler)))
    reference, candidate = (
        in_pieces(p, rows_at_once(p, MOST_BYTES, p.signature.max_batch)) for p in (program, lowered)
    )

    def counted(*inputs: torch.Tensor) -> torch.Tensor:
        ctx.progress.advance(1)
        return candidate(*inputs)

    return compare_noise(reference, counted, program.sampler, x, conditions)


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now
