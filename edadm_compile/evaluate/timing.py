"""Timing that compares: contenders take turns in one process, ratios come from turns of the same round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

#: A thing to time: called with a running number that picks its input from a ring.
Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Measured values of one contender.

    Attributes:
        samples: one value per round, in order; microseconds per call, or a ratio without unit.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The value half of the rounds stay below."""
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """Linear interpolation between the sorted samples; `share` from 0 to 1."""
        values = sorted(self.samples)
        position = share * (len(values) - 1)
        low = math.floor(position)
        high = min(low + 1, len(values) - 1)
        return values[low] + (position - low) * (values[high] - values[low])

    def to_json(self) -> dict[str, float | int]:
        """Median and spread as plain values."""
        return {
            "median": self.median,
            "p10": self.quantile(0.1),
            "p90": self.quantile(0.9),
            "rounds": len(self.samples),
        }


class Clock(Protocol):
    """Times some calls in a row."""

    def measure(self, call: Call, first: int, count: int) -> float:
        """Microseconds per call of ``call(first)`` to ``call(first + count - 1)``, all work finished."""


@dataclass(frozen=True)
class WallClock:
    """Time of the host.

    Attributes:
        now: seconds.
    """

    now: Callable[[], float] = time.perf_counter

    def measure(self, call: Call, first: int, count: int) -> float:
        """As `Clock.measure`."""
        start = self.now()
        for i in range(first, first + count):
            call(i)
        return (self.now() - start) * 1e6 / count


@dataclass(frozen=True)
class EventClock:
    """CUDA events on the current stream.

    The GPU is idle at the start, so that the time of the host counts wherever the GPU has to wait for it.

    Attributes:
        device: a CUDA device.
    """

    device: torch.device | str = "cuda"

    def measure(self, call: Call, first: int, count: int) -> float:
        """As `Clock.measure`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        for i in range(first, first + count):
            call(i)
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e3 / count


def in_graph(call: Callable[[], object], repeats: int) -> Call:
    """A call that replays a CUDA graph of `repeats` calls: the host costs nothing then.

    Args:
        call: enqueues work on the current stream without waiting; called twice before it is recorded.
    """
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(repeats):
            call()
    return lambda number: graph.replay()


@dataclass(frozen=True)
class Rules:
    """How long and how often to measure.

    Attributes:
        rounds: turns of each contender.
        turn: microseconds a turn should last at least.
        most_calls: calls in a turn at most.
        stable: relative change between two windows of warm-up turns that counts as stable.
        window: turns in such a window.
        warm_turns: turns after which warm-up ends, stable or not.
        warm_time: microseconds after which it ends, stable or not.
    """

    rounds: int = 30
    turn: float = 10_000.0
    most_calls: int = 50
    stable: float = 0.02
    window: int = 4
    warm_turns: int = 60
    warm_time: float = 10e6


@dataclass(frozen=True)
class Times:
    """What `interleave` measured.

    Attributes:
        microseconds: per call, by contender.
        calls: calls in a turn, by contender.
        warm: whether the contender was stable when it was measured.
    """

    microseconds: Mapping[str, Timing]
    calls: Mapping[str, int] = field(default_factory=dict)
    warm: Mapping[str, bool] = field(default_factory=dict)

    def ratios(self, base: str) -> dict[str, Timing]:
        """Time of each contender over that of `base` in the same round."""
        below = self.microseconds[base].samples
        return {
            name: Timing(tuple(a / b for a, b in zip(timing.samples, below, strict=True)))
            for name, timing in self.microseconds.items()
        }

    def to_json(self, base: str | None = None) -> dict[str, Any]:
        """By contender: microseconds, calls in a turn, stability, ratio to `base`."""
        ratios = {} if base is None else self.ratios(base)
        return {
            name: {
                "microseconds": timing.to_json(),
                "calls_in_a_turn": self.calls[name],
                "stable": self.warm[name],
                **({"ratio": ratios[name].to_json()} if name in ratios else {}),
            }
            for name, timing in self.microseconds.items()
        }


def warm_up(call: Call, clock: Clock, rules: Rules) -> tuple[float, int, bool]:
    """Turns until two windows of them agree.

    Returns:
        microseconds per call at the end, calls in a turn, and whether it became stable.
    """
    seen: list[float] = []
    spent, count, number = 0.0, 1, 0
    while len(seen) < rules.warm_turns and (spent < rules.warm_time or not seen):
        seen.append(clock.measure(call, number, count))
        number += count
        spent += seen[-1] * count
        count = max(1, min(rules.most_calls, math.ceil(rules.turn / max(seen[-1], 1e-3))))
        if len(seen) >= 2 * rules.window and _agree(seen, rules):
            return statistics.median(seen[-rules.window :]), count, True
    return statistics.median(seen[-rules.window :]), count, False


def _agree(seen: Sequence[float], rules: Rules) -> bool:
    before, last = (
        statistics.median(part) for part in (seen[-2 * rules.window : -rules.window], seen[-rules.window :])
    )
    return abs(last - before) <= rules.stable * before


def interleave(contenders: Mapping[str, Call], clock: Clock, rules: Rules | None = None) -> Times:
    """Time contenders in turns: A B C A B C ...

    A turn of several calls begins with an untimed one, which brings back what the others pushed out of the caches.

    Args:
        contenders: by name; each gets numbers from 0 that never go back.
        clock: times calls.
        rules: how long and how often.
    """
    rules = rules or Rules()
    counts, warm = {}, {}
    for name, call in contenders.items():
        _, counts[name], warm[name] = warm_up(call, clock, rules)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    numbers = dict.fromkeys(contenders, 0)
    for _ in range(rules.rounds):
        for name, call in contenders.items():
            if counts[name] > 1:
                call(numbers[name])
                numbers[name] += 1
            samples[name].append(clock.measure(call, numbers[name], counts[name]))
            numbers[name] += counts[name]
    return Times({name: Timing(tuple(values)) for name, values in samples.items()}, counts, warm)
