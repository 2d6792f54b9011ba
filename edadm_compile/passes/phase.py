"""One pass of reconstruction over the network: each unit taken from a checkpoint, else trained and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edadm_compile.callbacks import BlockFinished
from edadm_compile.ir.program import Program
from edadm_compile.ir.subgraph import Unit
from edadm_compile.passes.base import Context
from edadm_compile.passes.checkpoint import MISFITS, Saved, load_all, resumed
from edadm_compile.passes.freed_memory import give_back
from edadm_compile.passes.out_of_memory import memory_guard
from edadm_compile.passes.records import check_learned, set_learned
from edadm_compile.passes.row_shares import held_rows
from edadm_compile.passes.streams import Streams

_ADVICE = (
    "free memory, or run again with a --memory limit for the caches, or a smaller reconstruction.batch, "
    "reconstruction.max_layers or --calib-samples"
)


@dataclass(frozen=True)
class Trained:
    """What training one unit gave: figures for the report, and what changed (`records.learned_state`)."""

    report: dict[str, Any]
    tensors: dict[str, Tensor]


#: Trains a unit at the current position of the streams: (program, unit, streams, phase, ctx, salt, label).
Train = Callable[[Program, Unit, Streams, str, Context, int, str], Trained]


class Phase:
    """A walk over the units in execution order.

    Args:
        phase: what is trained: "weights", "scales" or "joint".
        done: units of earlier phases; seeds depend on it.
        train: trains one unit.
    """

    def __init__(
        self, program: Program, units: Sequence[Unit], phase: str, ctx: Context, done: int, train: Train
    ) -> None:
        self._program, self._units, self._phase, self._ctx, self._done = program, units, phase, ctx, done
        self._train = train
        self._names = [f"reconstruct.{phase}.{number:03d}" for number in range(len(units))]
        self._reports: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """A report for each unit.

        Raises:
            ResourceError: out of memory; units before are kept.
        """
        if self._all_there():  # a finished phase is read by nobody: no need to compute its values
            for unit in self._units:
                self._settle(unit, None)
        else:
            with memory_guard("computing the values between blocks", _ADVICE):
                streams = Streams(self._program, self._units, held_rows(self._ctx), self._ctx.caches)
                streams.advance(lambda unit: self._settle(unit, streams))
        return self._reports

    def _all_there(self) -> bool:
        saved = load_all(self._ctx.checkpoints, self._names)
        if saved is None:
            return False
        try:
            for unit, one in zip(self._units, saved, strict=True):
                self._report_of(unit, one)
        except MISFITS:
            return False
        return True

    def _settle(self, unit: Unit, streams: Streams | None) -> None:
        """Restore a unit, else train it; without streams all were found to be there."""
        ctx, number = self._ctx, len(self._reports)
        label = f"block {number + 1}/{len(self._units)} {unit.name}"

        def make() -> Trained:
            assert streams is not None
            with memory_guard(f"reconstructing {label}", _ADVICE):
                salt = 100 + self._done + number
                return self._train(self._program, unit, streams, self._phase, ctx, salt, label)

        def state(trained: Trained) -> Saved:
            return Saved(trained.tensors, {"unit": unit.name, "phase": self._phase, "report": trained.report})

        def restore(saved: Saved) -> Trained:
            report = self._report_of(unit, saved)
            set_learned(self._program, saved.tensors)
            ctx.progress.advance(ctx.config.reconstruction.iters, f"{label} restored")
            return Trained(report, {})

        trained = resumed(ctx.checkpoints, self._names[number], make, state, restore)
        give_back()
        told = {"unit": unit.name, "kind": unit.kind, "layers": len(unit.layers), "phase": self._phase}
        self._reports.append(told | trained.report)
        before, after = trained.report["before"], trained.report["after"]
        ctx.progress.advance(0, f"{label} loss {before:.3e} → {after:.3e}")
        at = len(self._reports), len(self._units), len(unit.layers)
        ctx.block_finished(BlockFinished(unit.name, *at, self._phase, before, after))

    def _report_of(self, unit: Unit, saved: Saved) -> dict[str, Any]:
        """The report in a checkpoint that fits the unit.

        Raises:
            KeyError, ValueError: it belongs to another one.
        """
        check_learned(self._program, saved.tensors)
        if (saved.values["unit"], saved.values["phase"]) != (unit.name, self._phase):
            raise ValueError(f"holds {saved.values['unit']}, phase {saved.values['phase']}")
        return dict(saved.values["report"])
