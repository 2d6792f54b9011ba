from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edadm_compile.errors import TargetError
from edadm_compile.kernels import aot, census, request
from edadm_compile.kernels.launch import Launch, Tile
from edadm_compile.kernels.targets import SHARED_LIMIT, TARGETS
from tests.kernels import double
from tests.kernels.test_aot import operand, plan, product, rows

GOOD = census.Census(
    instructions=100, integer_mma=8, float_mma=0, spill_loads=0, spill_stores=0, byte_stores=0, byte_loads=0, async_copies=4, waits=2,
    registers=255, stack=0, shared=99 << 10, opcodes={},
)  # fmt: skip

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0440*/              @!P0 LDGSTS.E.BYPASS.128 [R4], desc[UR6][R14.64] ; /* 0x000000000e047fae */
        /*0450*/              @UP2 LDGSTS.E [R4], desc[UR6][R14.64] ;
        /*0460*/                   LDGDEPBAR ;
        /*0470*/                   DEPBAR.LE SB0, 0x1 ;
        /*0480*/                   IMMA.16832.S8.S8 R4, R2.ROW, R3.COL, R4 ;
        /*0490*/                   IGMMA.64x128x32.S8.S8 R24, gdesc[UR8], R24 ;
        /*04a0*/                   UTCIMMA gdesc[UR4] ;
        /*04b0*/                   HMMA.16816.F32 R4, R2, R3, R4 ;
        /*04c0*/                   STL [R1], R2 ;
        /*04d0*/                   STL.64 [R1], R2 ;
        /*04e0*/               @P1 LDL.LU R2, [R1] ;
        /*04f0*/                   STS.U8 [R2], R3 ;
        /*0500*/                   STS.S8 [R2], R3 ;
        /*0510*/                   STS.U16 [R2], R3 ;
        /*0520*/                   STS.128 [R2], R4 ;
        /*0528*/                   LDS.U8 R2, [R3] ;
        /*10530*/                  EXIT ;
        /*10540*/                  NOP ;
"""


@pytest.fixture
def fake_tool(monkeypatch):
    usage = " Function k:\n  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:392"
    monkeypatch.setattr(census, "_dump", lambda data, option: LISTING if option == "-sass" else usage)


def test_instructions_are_counted_by_kind(fake_tool):
    found = census.census(b"", shared=500)
    assert replace(found, opcodes={}) == census.Census(
        instructions=18, integer_mma=3, float_mma=1, spill_loads=1, spill_stores=2, byte_stores=2, byte_loads=1,
        async_copies=2, waits=1, registers=40, stack=16, shared=500, opcodes={},
    )  # fmt: skip
    assert found.opcodes["LDGSTS.E.BYPASS.128"] == 1 and "NOP" not in found.opcodes


def test_a_good_kernel_has_no_violations():
    assert all(census.check(GOOD, arch, integer=True) == [] for arch in TARGETS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"registers": 256}, "256 registers, allowed 255"),
        ({"shared": (99 << 10) + 1}, "101377 bytes of shared memory, sm_89 has 101376"),
        ({"spill_stores": 1}, "registers spill: 1 stores, 0 loads"),
        ({"spill_loads": 2}, "registers spill: 0 stores, 2 loads"),
        ({"byte_stores": 5}, "5 stores of single bytes in shared memory: an operand is not K-major"),
        ({"byte_loads": 6}, "6 loads of single bytes in shared memory: an operand is not K-major"),
        ({"integer_mma": 0}, "no integer tensor-core instruction"),
        ({"float_mma": 1}, "1 floating-point tensor-core instructions in an integer kernel"),
    ],
)
def test_each_violation_is_one_sentence(change, sentence):
    assert census.check(replace(GOOD, **change), "sm_89", integer=True) == [sentence]


def test_float_kernels_need_no_integer_instructions():
    assert census.check(replace(GOOD, integer_mma=0, float_mma=9), "sm_90", integer=False) == []


def test_limits_are_those_of_the_architectures():
    assert {arch: limit >> 10 for arch, limit in SHARED_LIMIT.items()} == {
        "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99
    }  # fmt: skip


def test_machine_code_is_read(monkeypatch, tmp_path):
    """A matrix product has integer tensor-core instructions and asynchronous copies; an elementwise kernel neither."""
    double.install(monkeypatch)
    plans = [plan(product(64), rows(), arch="sm_80"), plan(product(64))]
    cubins = aot.compile_plans(plans, jobs=2, cache=tmp_path)
    (dot80, rows80), (dot90,) = (aot.plan_keys(p) for p in plans)
    for key, shape in ((dot80, "IMMA.16832.S8.S8"), (dot90, "IGMMA.64x64x32.S8.S8")):
        found = census.census(cubins[key].data, cubins[key].shared)
        assert any(name.startswith(shape) for name in found.opcodes)
        assert found.async_copies > 0 and found.waits > 0 and found.shared == cubins[key].shared > 0
        assert census.check(found, "sm_89", integer=True) == []
    found = census.census(cubins[rows80].data)
    assert (found.integer_mma, found.async_copies, found.shared) == (0, 0, 0) and found.instructions > 10
    assert census.check(found, "sm_80", integer=True) == ["no integer tensor-core instruction"]


def test_an_operand_in_the_wrong_order_shows(monkeypatch, tmp_path):
    """[K, N] weights of 8-bit codes go through shared memory byte by byte and lose asynchronous copies."""
    double.install(monkeypatch)
    operands = product().operands
    wrong = replace(
        product(64), kernel="wrong", operands={**operands, "b": operand("constant", "w", torch.int8, 512, 512)}
    )
    monkeypatch.setitem(
        double.DOUBLES, "wrong", replace(double.PRODUCT, entry="tests.kernels.double_triton:n_major_kernel")
    )
    for arch, found in (("sm_89", "loads"), ("sm_90", "stores")):
        plans = [plan(product(64), arch=arch), plan(wrong, arch=arch)]
        cubins = aot.compile_plans(plans, jobs=2, cache=tmp_path)
        good, bad = (census.census(cubins[aot.plan_keys(p)[0]].data) for p in plans)
        assert bad.async_copies < good.async_copies and census.check(good, arch, integer=True) == []
        assert [f"{found} of single bytes" in text for text in census.check(bad, arch, integer=True)] == [True]


def test_spills_are_seen(monkeypatch, tmp_path):
    """One warp cannot hold a 128 x 128 accumulator: 512 registers per thread."""
    double.install(monkeypatch)
    launch = product(128)
    tight = Launch(**{**vars(launch), "tile": Tile({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 1, 2)})
    (cubin,) = aot.compile_plans([plan(tight, arch="sm_89")], cache=tmp_path).values()
    found = census.census(cubin.data, cubin.shared)
    assert cubin.spills > 0 and found.spill_loads > 0 and found.spill_stores > 0
    assert census.check(found, "sm_89", integer=True)[0].startswith("registers spill")


def test_what_is_no_machine_code_is_refused():
    with pytest.raises(TargetError, match="cuobjdump cannot read"):
        census.census(b"\x7fELF nothing")


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(census, "triton_folder", lambda: tmp_path)
    with pytest.raises(TargetError, match=r"needs cuobjdump, which .* does not contain"):
        census.disassemble(b"")
    assert isinstance(request.triton_folder(), Path)
