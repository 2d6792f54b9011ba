"""One option per layer by integer programming: least error within a size, or least size within an error.

With x[b, o] in {0, 1}, sum over o of x[b, o] = 1 for each layer b, both problems are a multiple-choice knapsack: minimise
sum of cost[b, o] x[b, o] subject to sum of load[b, o] x[b, o] <= cap. HiGHS (through `scipy.optimize.milp`) solves it by
branch and bound.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: The solver stops once its solution is proved to be within this share of the best one.
GAP = 1e-6
#: The solver keeps a bound to 1e-6 only. Where its solution overshoots the exact one, it gets a bound less this share.
_TIGHTER = (0.0, 2e-6, 2e-5, 2e-4)


@dataclass(frozen=True)
class Choice:
    """What can be done with one layer.

    Attributes:
        errors: predicted squared error of the output, by option; not negative.
        bits: stored weight bits, by option.
    """

    errors: tuple[float, ...]
    bits: tuple[int, ...]


def least_error(choices: Sequence[Choice], most_bits: float) -> list[int] | None:
    """Option of each layer with the least summed error and at most `most_bits` stored; None if there is none."""
    unit = math.gcd(*(b for c in choices for b in c.bits)) or 1
    # Half a unit of slack changes nothing for integers and keeps the solver's tolerance out of the matter.
    return _solve([c.errors for c in choices], [[b // unit for b in c.bits] for c in choices], most_bits // unit + 0.5)


def least_bits(choices: Sequence[Choice], most_error: float) -> list[int] | None:
    """Option of each layer with the fewest stored bits and at most `most_error` summed; None if there is none."""
    return _solve([c.bits for c in choices], [c.errors for c in choices], most_error)


def total_error(choices: Sequence[Choice], picked: Sequence[int]) -> float:
    """Summed error of an assignment."""
    return sum(c.errors[o] for c, o in zip(choices, picked, strict=True))


def total_bits(choices: Sequence[Choice], picked: Sequence[int]) -> int:
    """Stored bits of an assignment."""
    return sum(c.bits[o] for c, o in zip(choices, picked, strict=True))


def smallest(choices: Sequence[Choice]) -> int:
    """Fewest stored bits that any assignment has."""
    return sum(min(c.bits) for c in choices)


def _solve(cost: Sequence[Sequence[float]], load: Sequence[Sequence[float]], cap: float) -> list[int] | None:
    lightest = [min(range(len(row)), key=row.__getitem__) for row in load]
    if _total(load, lightest) > cap:
        return None
    for share in _TIGHTER:
        picked = _milp(cost, load, cap * (1 - share))
        if picked is not None and _total(load, picked) <= cap:
            return picked
    return lightest  # the bound leaves less room than the solver can resolve


def _milp(cost: Sequence[Sequence[float]], load: Sequence[Sequence[float]], cap: float) -> list[int] | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owner = [b for b, row in enumerate(cost) for _ in row]
    count = len(owner)
    # Tolerances of the solver are absolute: costs are put in units of the least possible sum, loads in units of the cap.
    unit = sum(min(row) for row in cost) or max(max(row) for row in cost) or 1.0
    one_each = csr_array((np.ones(count), (owner, range(count))), shape=(len(cost), count))
    loads = np.array([v for row in load for v in row]) / (cap or 1.0)
    with _without_stdout():
        result = milp(
            np.array([v for row in cost for v in row]) / unit,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(loads[None], -np.inf, 1.0 if cap else 0.0)],
            options={"mip_rel_gap": GAP},
        )
    if result.x is None:
        return None
    values = iter(result.x)
    picked = []
    for row in cost:
        weights = [next(values) for _ in row]
        picked.append(max(range(len(row)), key=weights.__getitem__))
    return picked


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """Close the process's standard output for a moment: HiGHS has a forgotten printf, which would spoil ``--json``."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)


def _total(values: Sequence[Sequence[float]], picked: Sequence[int]) -> float:
    return sum(row[o] for row, o in zip(values, picked, strict=True))
