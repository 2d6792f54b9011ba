"""What a long call tells while it works: events, and who receives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edadm_compile.errors import InputError


@dataclass(frozen=True)
class StageStarted:
    """A stage of the work begins.

    Attributes:
        stage: name, such as "calibration samples" or "reconstruct".
        total: steps that will follow; None where that is not known.
    """

    stage: str
    total: int | None


@dataclass(frozen=True)
class Advanced:
    """Steps of the running stage are done.

    Attributes:
        stage: its name.
        done: steps since it began.
        total: of all steps, an upper bound; None where it is not known.
        message: a short remark, such as a block and its loss; may be empty.
    """

    stage: str
    done: int
    total: int | None
    message: str


@dataclass(frozen=True)
class BlockFinished:
    """A block was reconstructed.

    Attributes:
        block: name.
        index: 1 for the first.
        total: blocks of this phase.
        layers: quantized layers in it.
        phase: "joint", or which of weights and scales was learned in methods that learn them apart.
        before, after: error of its output over the energy of that output, no unit.
    """

    block: str
    index: int
    total: int
    layers: int
    phase: str
    before: float
    after: float


Event = StageStarted | Advanced | BlockFinished


class Callbacks(Protocol):
    """Receives events. Inherit from it and override what is of interest; the others do nothing.

    Methods run in the thread of the call, between two pieces of work. What one raises ends the call: it reaches the
    caller as it is, and no file is written.
    """

    def stage_started(self, event: StageStarted) -> None:
        """A stage begins."""

    def advanced(self, event: Advanced) -> None:
        """Steps of the running stage are done."""

    def block_finished(self, event: BlockFinished) -> None:
        """A block was reconstructed."""


#: One receiver: an object with the methods of `Callbacks`, or a function that takes every event.
Receiver = Callbacks | Callable[[Event], object]
_METHODS = ("stage_started", "advanced", "block_finished")


class Dispatcher:
    """Hands what passes report to receivers, in their order.

    Args:
        receivers: one, several or none.

    Raises:
        InputError: something that is neither a function nor has the methods.
    """

    def __init__(self, receivers: Receiver | Sequence[Receiver] | None) -> None:
        listed: Any = [] if receivers is None else receivers if isinstance(receivers, (list, tuple)) else [receivers]
        for item in listed:
            _check(item)
        self._receivers: list[Receiver] = list(listed)
        self._stage = ""
        self._done = 0
        self._total: int | None = None

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins; `total` steps will follow if known."""
        self._stage, self._done, self._total = name, 0, total
        self._send(StageStarted(name, total))

    def advance(self, steps: int = 1, message: str = "") -> None:
        """`steps` of the current stage are done."""
        self._done += steps
        self._send(Advanced(self._stage, self._done, self._total, message))

    def block(self, event: BlockFinished) -> None:
        """A block was reconstructed."""
        self._send(event)

    def _send(self, event: Event) -> None:
        for receiver in self._receivers:
            if not _has_methods(receiver):
                receiver(event)  # type: ignore[operator]
            elif isinstance(event, StageStarted):
                receiver.stage_started(event)  # type: ignore[union-attr]
            elif isinstance(event, Advanced):
                receiver.advanced(event)  # type: ignore[union-attr]
            else:
                receiver.block_finished(event)  # type: ignore[union-attr]


def _has_methods(receiver: object) -> bool:
    return all(callable(getattr(receiver, name, None)) for name in _METHODS)


def _check(receiver: object) -> None:
    if isinstance(receiver, type) or not (_has_methods(receiver) or callable(receiver)):
        got = f"the class {receiver.__name__}, not an object of it" if isinstance(receiver, type) else repr(receiver)
        raise InputError(
            f"callbacks: got {got}; allowed are a function of one event, an object of a class that inherits from "
            "edadm_compile.Callbacks, or a list of these"
        )
