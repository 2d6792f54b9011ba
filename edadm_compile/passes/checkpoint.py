"""What a long compilation keeps between runs: each stage's result as tensors and plain values."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from edadm_compile.ir.program import Program

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """The result of one stage, or of one reconstructed block.

    Attributes:
        tensors: by name; a store gives them back bit for bit, strides included.
        values: what JSON can hold; tuples come back as lists.
        seconds: how long the making took, in the run that made it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Checkpoints(Protocol):
    """Keeps results of stages; `edadm_compile.driver.workdir` writes them to a folder."""

    @property
    def restored(self) -> Mapping[str, float]:
        """Seconds that the stages loaded in this run took in an earlier one, by name."""

    def begin(self, program: Program) -> None:
        """The captured float program, before any stage is loaded or saved: what is kept must belong to it."""

    def load(self, name: str) -> Saved | None:
        """The result of a stage in memory of its own, or None where it is missing or damaged."""

    def save(self, name: str, saved: Saved) -> None:
        """Keep the result of a stage."""

    def reject(self, name: str, reason: str) -> None:
        """What `load` gave does not fit the program: it will be made again."""


class NoCheckpoints:
    """Keeps nothing."""

    restored: Mapping[str, float] = MappingProxyType({})

    def begin(self, program: Program) -> None:
        """Ignore."""

    def load(self, name: str) -> Saved | None:
        """Nothing."""
        return None

    def save(self, name: str, saved: Saved) -> None:
        """Ignore."""

    def reject(self, name: str, reason: str) -> None:
        """Ignore."""


#: What a checkpoint with the right checksum can still raise when it does not fit the program.
MISFITS = (LookupError, ValueError, TypeError, AttributeError, RuntimeError)


def resumed(
    checkpoints: Checkpoints,
    name: str,
    make: Callable[[], T],
    state: Callable[[T], Saved],
    restore: Callable[[Saved], T],
) -> T:
    """A stage's result: what an earlier run kept, else made now and kept.

    Args:
        make: does the work.
        state: what of its result has to be kept.
        restore: the result again, exactly; must change nothing when it raises one of `MISFITS`.
    """
    saved = checkpoints.load(name)
    if saved is not None:
        try:
            return restore(saved)
        except MISFITS as error:
            checkpoints.reject(name, f"{type(error).__name__}: {error}")
    start = time.perf_counter()
    made = make()
    checkpoints.save(name, replace(state(made), seconds=time.perf_counter() - start))
    return made


def load_all(checkpoints: Checkpoints, names: Sequence[str]) -> list[Saved] | None:
    """The results of several stages, or None unless all are there."""
    found = []
    for name in names:
        saved = checkpoints.load(name)
        if saved is None:
            return None
        found.append(saved)
    return found


def machine() -> dict[str, str]:
    """What may change the order of float sums, and so the last bits, without being an input."""
    return {"threads": str(torch.get_num_threads()), "cpu": torch.backends.cpu.get_cpu_capability()}
