"""What a pass is, and the one function that runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from edadm_compile.callbacks import BlockFinished
from edadm_compile.config import QuantConfig
from edadm_compile.errors import DialectError
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.program import Program
from edadm_compile.parallel.world import World
from edadm_compile.passes.caches import Caches
from edadm_compile.passes.checkpoint import Checkpoints, NoCheckpoints, Saved, resumed


class Progress(Protocol):
    """Receives progress of long work; the command line draws it, the library default ignores it."""

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins; `total` steps will follow if known."""

    def advance(self, steps: int = 1, message: str = "") -> None:
        """`steps` of the current stage are done; `message` is a short remark such as a loss.

        With 0 steps the message stands for itself: the result of a block (shown with ``--verbose``), or a warning
        (`is_warning`), shown at once.
        """


_WARNING = "warning: "


def is_warning(message: str) -> bool:
    """Whether a remark is a warning of `Context.warn`."""
    return message.startswith(_WARNING)


class Silent:
    """A `Progress` that ignores everything."""

    def stage(self, name: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Ignore."""


@dataclass
class Context:
    """What passes may use besides the program.

    Attributes:
        config: the frozen settings.
        calibration: the calibration set, once collected (see `edadm_compile.calibration.dataset`).
        progress: where to report.
        stats: results of finished passes by name.
        warnings: what the user must know about the result, in the order found; see `warn`.
        block_finished: told each reconstructed block.
        world: the processes that work on this together.
        checkpoints: what earlier runs kept, and where this one keeps its results.
        caches: room for values of the whole calibration set.
    """

    config: QuantConfig
    calibration: Any = None
    progress: Progress = field(default_factory=Silent)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    block_finished: Callable[[BlockFinished], None] = lambda event: None
    world: World = field(default_factory=World)
    checkpoints: Checkpoints = field(default_factory=NoCheckpoints)
    caches: Caches = field(default_factory=Caches)

    def warn(self, text: str) -> None:
        """Keep a sentence for the summary, and report it at once; the same sentence only once."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.progress.advance(0, _WARNING + text)

    def all_warnings(self) -> list[str]:
        """Sentences of the calibration, then those in the statistics of passes, which may come from an earlier run."""
        of_passes = [text for stats in self.stats.values() for text in stats.get("warnings", ())]
        return list(dict.fromkeys([*(t for t in self.warnings if t not in of_passes), *of_passes]))

    def generator(self, salt: int) -> torch.Generator:
        """A random generator of its own for one purpose, so that adding a pass does not shift another's draws."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + salt)


@dataclass(frozen=True)
class PassResult:
    """Outcome of a pass: the new program, whether it differs, and numbers worth reporting."""

    program: Program
    changed: bool
    stats: dict[str, Any] = field(default_factory=dict)


class Pass(Protocol):
    """A program transformation: reads one dialect, writes one dialect."""

    @property
    def name(self) -> str:
        """Name in dumps and statistics."""

    @property
    def reads(self) -> str:
        """Dialect it accepts."""

    @property
    def writes(self) -> str:
        """Dialect it produces."""

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Transform a private copy of the program."""


@runtime_checkable
class Resumable(Protocol):
    """A pass whose work is worth keeping: what it found out, without the graph."""

    def state(self, program: Program) -> Saved:
        """What `restore` needs, from the program that `run` produced."""

    def restore(self, program: Program, saved: Saved) -> Program:
        """Do to a private copy of the program what `run` did; change nothing shared when it does not fit."""


def run_passes(
    program: Program, passes: Sequence[Pass], ctx: Context, dump: Callable[[str, Program], None] | None = None
) -> Program:
    """Run passes in order on private copies, verifying after each.

    Args:
        dump: called with the pass name and its result, for inspection.

    Raises:
        DialectError: a pass got a dialect it does not read, or produced an illegal graph.
    """
    for item in passes:
        if program.dialect != item.reads:
            raise DialectError(f"pass {item.name} reads dialect {item.reads}, got {program.dialect}")
        start, told = time.perf_counter(), len(ctx.warnings)
        result = _run(item, program, ctx)
        if result.program.dialect != item.writes:
            raise DialectError(f"pass {item.name} writes dialect {item.writes}, got {result.program.dialect}")
        verify(result.program)
        program = result.program
        warnings = {"warnings": ctx.warnings[told:]} if ctx.warnings[told:] else {}
        seconds = time.perf_counter() - start
        ctx.stats[item.name] = {**result.stats, **warnings, "changed": result.changed, "seconds": seconds}
        if dump is not None:
            dump(item.name, program)
    return program


def _run(item: Pass, program: Program, ctx: Context) -> PassResult:
    """Run a pass, or restore what it found out in an earlier run."""
    if not isinstance(item, Resumable):
        return item.run(program.fork(), ctx)
    keeper: Resumable = item

    def state(result: PassResult) -> Saved:
        saved = keeper.state(result.program)
        return Saved(saved.tensors, {**saved.values, "changed": result.changed, "stats": result.stats})

    def restore(saved: Saved) -> PassResult:
        changed, stats = bool(saved.values["changed"]), dict(saved.values["stats"])
        return PassResult(keeper.restore(program.fork(), saved), changed, stats)

    return resumed(ctx.checkpoints, item.name, lambda: item.run(program.fork(), ctx), state, restore)


def finish(program: Program) -> Program:
    """Remove dead nodes (inputs stay, they are the signature), check and recompile the graph."""
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
