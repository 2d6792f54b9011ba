"""The integer program against every assignment there is, on small instances."""

import itertools
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.passes.width_program import (
    GAP,
    Choice,
    least_bits,
    least_error,
    smallest,
    total_bits,
    total_error,
)


@st.composite
def choices(draw):
    """Up to seven layers with one or two options; errors span six orders of magnitude, some options are useless."""
    found = []
    for _ in range(draw(st.integers(1, 7))):
        size = draw(st.integers(1, 5000))
        errors = [draw(st.integers(0, 10**6)) for _ in range(draw(st.integers(1, 2)))]
        found.append(Choice(tuple(map(float, errors)), (4 * size, 8 * size)[: len(errors)]))
    return found


def _all(program):
    return itertools.product(*(range(len(c.errors)) for c in program))


@settings(max_examples=150, deadline=None)
@given(choices(), st.floats(-0.2, 1.2))
def test_the_least_error_within_a_size_is_that_of_all_assignments(program, place):
    low, high = smallest(program), sum(max(c.bits) for c in program)
    budget = low + place * (high - low)
    fits = [p for p in _all(program) if total_bits(program, p) <= budget]
    picked = least_error(program, budget)
    if not fits:
        assert picked is None
        return
    assert total_bits(program, picked) <= budget
    best = min(total_error(program, p) for p in fits)
    assert total_error(program, picked) <= best * (1 + 2 * GAP)


@settings(max_examples=150, deadline=None)
@given(choices(), st.floats(-0.2, 1.2))
def test_the_least_size_within_an_error_is_that_of_all_assignments(program, place):
    low = sum(min(c.errors) for c in program)
    high = sum(max(c.errors) for c in program)
    limit = int(low + place * (high - low)) + 0.5  # never within the solver's tolerance of an integer sum
    fits = [p for p in _all(program) if total_error(program, p) <= limit]
    picked = least_bits(program, limit)
    if not fits:
        assert picked is None
        return
    assert total_error(program, picked) <= limit
    best = min(total_bits(program, p) for p in fits)
    assert total_bits(program, picked) <= best * (1 + 2 * GAP)


@settings(max_examples=60, deadline=None)
@given(choices(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_budget_is_never_worse(program, a, b):
    low, high = smallest(program), sum(max(c.bits) for c in program)
    errors = [total_error(program, least_error(program, low + p * (high - low))) for p in sorted((a, b))]
    assert errors[1] <= errors[0] * (1 + 2 * GAP)


def test_bounds_that_are_met_exactly_count_as_met():
    program = [Choice((9.0, 1.0), (4, 8)), Choice((5.0, 2.0), (12, 24)), Choice((3.0,), (8,))]
    assert least_error(program, smallest(program)) == [0, 0, 0]
    assert least_error(program, 28) == [1, 0, 0] and least_error(program, 27.999) == [0, 0, 0]
    assert least_error(program, smallest(program) - 1) is None
    assert least_bits(program, 6.0) == [1, 1, 0] and least_bits(program, 5.999) is None
    assert least_bits(program, 17.0) == [0, 0, 0]


def test_errors_of_zero_are_no_special_case():
    program = [Choice((1.0, 0.0), (4, 8)), Choice((0.0, 0.0), (4, 8))]
    assert least_error(program, 12) == [1, 0] or total_error(program, least_error(program, 12)) == 0
    assert total_bits(program, least_bits(program, 0.0)) == 12


def test_small_differences_are_seen_beside_large_errors():
    """One layer has a millionfold error that nothing can lower; the others must still be chosen rightly."""
    program = [Choice((1e3,), (8,)), Choice((2e-2, 1e-2), (400, 800)), Choice((3e-2, 1e-2), (400, 800))]
    assert least_error(program, 1208) == [0, 0, 1]


def test_nothing_that_the_solver_prints_reaches_standard_output():
    code = (
        "import os, edadm_compile.passes.width_program as w\n"
        "import scipy.optimize as o; milp = o.milp\n"
        "def noisy(*a, **k): os.write(1, b'noise'); return milp(*a, **k)\n"
        "o.milp = noisy; print('before')\n"
        "assert w.least_error([w.Choice((1.0, 0.1), (4, 8))], 8) == [1]; print('after')"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown == "before\nafter\n"
