"""Scales of charts: where a value lies, and which values get a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Steps between labels are these times a power of ten.
_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Linear:
    """Values from `low` to `high` onto positions from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Position of a value."""
        width = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / width * (self.end - self.start)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that span `low` to `high`, about `count` of them.

    The first is at most `low` and the last at least `high`, so that they can be the ends of an axis.
    """
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in _STEPS if power * s >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def log_ends(values: Sequence[float]) -> tuple[int, int]:
    """Exponents of the powers of ten around positive values; (0, 1) where there are none."""
    known = [v for v in values if v > 0]
    if not known:
        return 0, 1
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return low, max(high, low + 1)


def log_share(value: float, ends: tuple[int, int]) -> float:
    """Position of a value between two powers of ten, 0 to 1; values below the lower one are 0."""
    if value <= 0:
        return 0.0
    return min(1.0, max(0.0, (math.log10(value) - ends[0]) / (ends[1] - ends[0])))


def timestep(value: float) -> str:
    """A timestep: whole ones without decimals."""
    return f"{value:.6g}"


def number(value: float | None, digits: int = 3) -> str:
    """A figure with a few significant digits; a dash where there is none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}".replace("-", "−")
    places = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{places}f}".replace("-", "−")
