"""The static memory plan: no two buffers share bytes while both are alive."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.kernels import execute
from edadm_compile.kernels.launch import ALIGNMENT, Buffer, Launch, Operand
from edadm_compile.lowering import arena
from tests.graphs import TinyUNet
from tests.lowering.plans import inputs_of, lowered, plan_of, run

LIFE = st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 6))


def overlapping(a, b):
    alive = a.first <= b.last and b.first <= a.last
    return alive and a.offset < b.offset + b.size and b.offset < a.offset + a.size


@given(st.lists(LIFE, max_size=30))
@settings(max_examples=150, deadline=None)
def test_living_buffers_never_share_bytes(lives):
    buffers = [Buffer(size, first, first + length) for size, first, length in lives]
    placed, size = arena.plan(buffers)
    used = [b for b in placed if b.size]
    assert not any(overlapping(a, b) for i, a in enumerate(used) for b in used[:i])
    assert all(b.offset % ALIGNMENT == 0 and b.offset >= 0 and b.offset + b.size <= size for b in placed)


def test_one_after_the_other_takes_the_room_of_the_largest():
    placed, size = arena.plan([Buffer(1000, 0, 1), Buffer(3000, 2, 3), Buffer(2000, 4, 5)])
    assert [b.offset for b in placed] == [0, 0, 0] and size == 3072


def launch(reads, writes):
    operands = {f"in{i}": Operand("arena", key, torch.int8, (1,), (1,)) for i, key in enumerate(reads)}
    operands["out"] = Operand("arena", writes, torch.int8, (1,), (1,))
    return Launch("torch", "", operands)


def test_what_runs_once_per_prompt_is_kept():
    """Buffer 0 is written by a conditioning launch and read in every step: nothing may ever take its place."""
    found = arena.lifetimes([launch([], 0), launch([0], 1), launch([1], 2)], [8, 8, 8, 8], list("abcd"), 1)
    assert (found[0].first, found[0].last) == (0, 3)
    assert (found[1].first, found[1].last) == (1, 2) and found[3].size == 0


@pytest.fixture(scope="module")
def program():
    return lowered(TinyUNet())


def test_the_arena_is_smaller_than_its_buffers(program):
    plan = plan_of(program)
    assert plan.arena < 0.5 * sum(b.size for b in plan.buffers)


def test_a_buffer_that_dies_too_early_is_found(program):
    """The check itself can fail: shorten one life by a launch, and the poison reaches the output."""
    from dataclasses import replace

    plan, inputs = plan_of(program), inputs_of(program, 2)
    expected = run(program, plan, inputs)
    index = next(i for i, b in enumerate(plan.buffers) if b.size and b.last > b.first + 1)
    buffers = list(plan.buffers)
    buffers[index] = replace(buffers[index], last=buffers[index].last - 1)
    broken = replace(plan, buffers=tuple(buffers))
    assert not torch.equal(run(program, broken, inputs), expected)


def test_counters_left_behind_are_reported(program):
    plan = plan_of(program)
    from tests.lowering.plans import memory_of, table_rows

    memory, inputs = memory_of(program, plan), inputs_of(program, 2)

    def careless(item, tensors):
        execute.reference(item, tensors)
        memory.counters[0] = 1

    with pytest.raises(AssertionError, match="counter"):
        execute.run(memory, inputs + table_rows(program, plan, inputs[1]), careless)
