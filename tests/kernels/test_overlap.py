"""Launches that may start before the one in front of them has ended: in the machine code, the wait comes first."""

import re
from dataclasses import replace

import pytest

from edadm_compile.driver import synthetic
from edadm_compile.driver.tune_search import key_of
from edadm_compile.kernels import aot, census, qconv2d_sm90
from edadm_compile.kernels.registry import kernel

#: What touches memory that other launches use: loads (plain and asynchronous), stores, atomics, bulk copies.
GLOBAL = re.compile(r"LDG|STG|ATOM|RED\b|UTMA|UBLK|LD\.|ST\.")
MADE = {
    "conv": lambda settings: synthetic.convolution(settings, 64, 64, (8, 8), 3),
    "int4 conv": lambda settings: synthetic.convolution(settings, 64, 64, (8, 8), 3, bits=4),
    "linear": lambda settings: synthetic.linear(settings, 64, 64, 64),
    "norm": lambda settings: synthetic.group_norm(settings, 64, 64),
    "attention": lambda settings: synthetic.attention(settings, 64, 64, 2, 32),
}


def opcodes(data):
    return [match[1] for match in census._INSTRUCTION.finditer(census._dump(data, "-sass"))]


def asynchronous(make, settings):
    launch = make(settings).launch
    tile = qconv2d_sm90.candidates(kernel(launch.kernel).values(launch))[0]
    return make(replace(settings, tiles={key_of(launch): tile}))


@pytest.mark.parametrize("path", ["portable", "asynchronous"])
@pytest.mark.parametrize("name", MADE)
def test_nothing_is_read_or_written_before_the_wait(name, path):
    settings = synthetic.Settings("sm_90", 1)
    if path == "asynchronous" and name in ("norm", "attention"):
        pytest.skip("there is one kernel for it")
    made = asynchronous(MADE[name], settings) if path == "asynchronous" else MADE[name](settings)
    assert made.launch.kernel.endswith("_sm90") == (path == "asynchronous")
    (cubin,) = aot.compile_plans([made.plan]).values()
    code = opcodes(cubin.data)
    waits = [i for i, op in enumerate(code) if op.startswith("ACQBULK")]
    touches = [i for i, op in enumerate(code) if GLOBAL.match(op)]
    assert cubin.overlaps and len(waits) == 1 and touches and waits[0] < touches[0]
    assert [i > waits[0] for i, op in enumerate(code) if op.startswith("PREEXIT")] == [True]


def test_architectures_without_it_get_neither():
    (cubin,) = aot.compile_plans([MADE["linear"](synthetic.Settings("sm_89", 1)).plan]).values()
    assert not cubin.overlaps and not any(op.startswith(("ACQBULK", "PREEXIT")) for op in opcodes(cubin.data))
