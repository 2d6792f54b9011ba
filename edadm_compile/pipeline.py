"""The compiler's main line: which passes run, in which order, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from edadm_compile import notebook
from edadm_compile.calibration import sampler
from edadm_compile.calibration.collect import collect
from edadm_compile.calibration.dataset import CalibrationSet
from edadm_compile.calibration.given import CalibrationSamples
from edadm_compile.callbacks import BlockFinished
from edadm_compile.config import QuantConfig
from edadm_compile.errors import CaptureError
from edadm_compile.evaluate.compare import NoiseComparison, compare_noise
from edadm_compile.frontend import Source
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.footprint import MOST_BYTES, rows_at_once
from edadm_compile.ir.program import Program, text_of
from edadm_compile.ir.valueless import without_values
from edadm_compile.kernels import reference as _reference  # registers the operators' meaning  # noqa: F401
from edadm_compile.parallel.world import World, divided
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context, Pass, Progress, Silent, run_passes
from edadm_compile.passes.caches import Caches
from edadm_compile.passes.calibrate import Calibrate
from edadm_compile.passes.canonicalize import Canonicalize
from edadm_compile.passes.checkpoint import Checkpoints, NoCheckpoints, Saved, machine, resumed
from edadm_compile.passes.decompose_attention import DecomposeAttention
from edadm_compile.passes.finite import check_parameters
from edadm_compile.passes.float_outputs import FloatOutputs
from edadm_compile.passes.fold_attention import FoldAttention
from edadm_compile.passes.freed_memory import give_back
from edadm_compile.passes.freeze import Freeze
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.lower import Lower
from edadm_compile.passes.mean_correction import MeanCorrection
from edadm_compile.passes.mixed_widths import check_reachable
from edadm_compile.passes.other_shapes import OtherShape, carry, compare
from edadm_compile.passes.out_of_memory import memory_guard
from edadm_compile.passes.reconstruct import Reconstruct
from edadm_compile.passes.row_shares import check_divisible
from edadm_compile.passes.rule_check import check_rules
from edadm_compile.passes.sensitivity import MEASURE_LIMIT
from edadm_compile.passes.split_concat import SplitConcat
from edadm_compile.passes.time_tables import FoldTimePath
from edadm_compile.passes.trace import trace
from edadm_compile.passes.upsample_phases import UpsamplePhases
from edadm_compile.report.truth import program_rows

#: Fresh trajectories for the closing quality figure.
_QUALITY_TRAJECTORIES = 16


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
        source: where the model came from.
        selection: why the samples were allocated so, see `edadm_compile.calibration.dataset.CalibrationSet.selection`.
        warnings: sentences about values that the result should not be trusted with unseen; each names a layer.
        restored: seconds that earlier runs spent on what this one took from checkpoints, by stage.
        computed_with: what the last bits depend on besides inputs and versions (`edadm_compile.passes.checkpoint.machine`).
        others: qdq and lowered program of each further shape, with the constants of the first.
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
    selection: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    restored: dict[str, float] = field(default_factory=dict)
    computed_with: dict[str, str] = field(default_factory=dict)
    others: tuple[tuple[Program, Program], ...] = ()

    def __repr__(self) -> str:
        quality = "not measured" if self.quality is None else f"{self.quality.sqnr:.1f} dB"
        return f"CompileResult({self.config.name}, {self.config.method}, SQNR {quality}, {sum(self.seconds.values()):.0f} s)"

    def _repr_html_(self) -> str:
        """For notebooks: what was asked, what runs, size, quality, time."""
        quality = "not measured"
        if self.quality is not None:
            quality = f"{self.quality.sqnr:.1f} dB over all steps, worst step {self.quality.worst:.1f} dB"
        rows = [
            ("asked", f"{self.config.name}, method {self.config.method}"),
            *program_rows(self.lowered, self.config.name),
            ("noise SQNR against float", quality),
            ("time", f"{sum(self.seconds.values()):.0f} s"),
        ]
        return notebook.table("Compilation", rows)


def capture(source: Source) -> Program:
    """Trace a source and bring it to the canonical float program, ready for calibration."""
    exported, signature = source.export()
    program = trace(exported, signature, source.sampler, source.module, source.fixed)
    return program


def compare_shapes(source: Source, first: Program, config: QuantConfig, *, values: bool = True) -> list[OtherShape]:
    """Capture a source at its further shapes; what they change in its float program `first`.

    Args:
        values: compare the values of large constants too.

    Raises:
        CaptureError: the network cannot be captured at a shape, or is another graph there.
    """
    found = []
    for shape in source.other_shapes:
        try:
            program = capture(source.at(shape))
            program = program if values else without_values(program)
            program = run_passes(program, float_passes(), Context(config))
        except CaptureError as error:
            raise CaptureError(f"--shape {text_of(shape)}: {error}") from error
        found.append(compare(first, program))
    return found


def compile_source(
    source: Source,
    config: QuantConfig,
    progress: Progress | None = None,
    *,
    quality: bool = True,
    dump: Callable[[str, Program], None] | None = None,
    calibration: CalibrationSamples | None = None,
    block_finished: Callable[[BlockFinished], None] = lambda event: None,
    world: World | None = None,
    checkpoints: Checkpoints | None = None,
    caches: Caches | None = None,
) -> CompileResult:
    """Compile a loaded source with a configuration.

    Args:
        progress: receives stages and steps; silent by default.
        quality: measure the result against the float model on fresh noise at the end.
        dump: called with each pass's name and program.
        calibration: samples of the user's own, in place of those that are collected.
        block_finished: told each reconstructed block.
        world: the processes that compile together (`edadm_compile.parallel.launch`); all get the result.
        checkpoints: results of an earlier run, and where those of this one go; none by default.
        caches: room for values of the whole calibration set; in memory by default.

    Raises:
        EdadmError: see `edadm_compile.errors`.
    """
    ctx = Context(
        config,
        progress=progress or Silent(),
        block_finished=block_finished,
        world=world or World(),
        checkpoints=checkpoints or NoCheckpoints(),
        caches=caches or Caches(),
    )
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    torch.manual_seed(config.seed)  # nothing draws from the global generator, schedulers of other people might
    ctx.progress.stage("capture", None)
    program = capture(source)
    check_parameters(program)  # before constants are folded, under the names of the checkpoint
    program = run_passes(program, float_passes(), ctx, dump)
    # Before the expensive part: what is wrong or out of reach here stays so.
    check_rules(program, config)
    check_reachable(program, config)
    check_divisible(program, ctx)
    changes = compare_shapes(source, program, config)
    ctx.checkpoints.begin(program)
    clock.mark("capture")
    ctx.progress.stage("calibration samples", _evaluations(program, config))
    ctx.calibration = _calibration(program, source, calibration, ctx).moved(ctx.caches.keep)
    _warn_of_steps(ctx)
    clock.mark("calibration")
    result = program
    for item in quant_passes():
        with memory_guard(f"in the stage {item.name.replace('_', ' ')}", "free memory, or take fewer --calib-samples"):
            result = run_passes(result, [item], ctx, dump)
        if item.name == "freeze":
            qdq = result
        clock.mark(item.name)
    verify(qdq)
    others = tuple(carry(qdq, change, config) for change in changes)
    measured = _measured(program, result, source, ctx) if quality else None
    clock.mark("quality")
    counts = ctx.calibration.allocation.counts.tolist()
    restored: dict[str, float] = {}
    for name, spent in ctx.checkpoints.restored.items():
        stage = name.partition(".")[0]
        restored[stage] = restored.get(stage, 0.0) + spent
    return CompileResult(
        qdq, result, config, ctx.stats, seconds, measured, counts, source.parameter_bytes(), source.provenance(),
        ctx.calibration.selection(), ctx.all_warnings(), restored, machine(), others,
    )  # fmt: skip


def _warn_of_steps(ctx: Context) -> None:
    """Few samples are no error, but the ranges of steps without one are guesses."""
    counts = ctx.calibration.allocation.counts
    without = int((counts == 0).sum())
    if without:
        ctx.warn(
            f"{int(counts.sum())} calibration sample(s) for {counts.numel()} sampler steps: {without} steps have none, and "
            f"all layers are calibrated without them; give --calib-samples {counts.numel()} or more"
        )


def _calibration(program: Program, source: Source, given: CalibrationSamples | None, ctx: Context) -> CalibrationSet:
    def make() -> CalibrationSet:
        with memory_guard("collecting calibration samples", "free memory, or take fewer --calib-samples"):
            return collect(
                program, ctx.config, ctx.generator(1), pool=source.conditions, given=given,
                advance=ctx.progress.advance, world=ctx.world,
            )  # fmt: skip

    return resumed(
        ctx.checkpoints,
        "calibration",
        make,
        lambda made: Saved(*made.to_tensors()),
        lambda saved: CalibrationSet.from_tensors(saved.tensors, saved.values),
    )


def _measured(program: Program, lowered: Program, source: Source, ctx: Context) -> NoiseComparison:
    def restore(saved: Saved) -> NoiseComparison:
        values = saved.values
        branches = values["branches"]
        return NoiseComparison(
            values["sqnr"],
            values["sqnr_without_last"],
            tuple(values["per_step"]),
            None if branches is None else (branches[0], branches[1]),
        )

    return resumed(
        ctx.checkpoints,
        "quality",
        lambda: _quality(program, lowered, source, ctx),
        lambda made: Saved(values=asdict(made)),
        restore,
    )


def _evaluations(program: Program, config: QuantConfig) -> int:
    """Upper bound of model evaluations (rows) during calibration, for the progress bar."""
    calls = len(sampler.timesteps(program.sampler)) * program.sampler.branches
    return calls * (config.tdac.trajectories + config.calib_samples)


def quality_trajectories(source: Source, config: QuantConfig) -> int:
    """Fresh trajectories of the closing figure; for a large model no more than calibration could afford."""
    if source.parameters() > MEASURE_LIMIT:
        return min(_QUALITY_TRAJECTORIES, config.tdac.trajectories)
    return _QUALITY_TRAJECTORIES


def _quality(program: Program, lowered: Program, source: Source, ctx: Context) -> NoiseComparison:
    generator = ctx.generator(3)
    n = quality_trajectories(source, ctx.config)
    x = sampler.draw_noise(program.signature, n, generator)
    conditions = sampler.draw_conditions(program.signature, n, generator, source.conditions, program.sampler.null)
    ctx.progress.stage("quality", len(sampler.timesteps(program.sampler)))
    reference, candidate = (p.at_most(rows_at_once(p, MOST_BYTES, p.signature.max_batch)) for p in (program, lowered))

    def counted(*inputs: torch.Tensor) -> torch.Tensor:
        ctx.progress.advance(1)
        return candidate(*inputs)

    return compare_noise(divided(reference, ctx.world), divided(counted, ctx.world), program.sampler, x, conditions)


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def mark(self, stage: str) -> None:
        """A stage is over."""
        give_back()
        now = time.perf_counter()
        self._seconds[stage] = now - self._last
        self._last = now
