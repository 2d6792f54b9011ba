"""What the machine code of a kernel consists of: instruction counts, registers, spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edadm_compile.errors import TargetError
from edadm_compile.kernels.request import triton_folder
from edadm_compile.kernels.targets import REGISTER_LIMIT, SHARED_LIMIT

#: Matrix instructions by operand type: warp level, Hopper's warp groups, Blackwell's tensor memory.
_INTEGER_MMA = ("IMMA", "IGMMA", "UTCIMMA")
_FLOAT_MMA = ("HMMA", "HGMMA", "QMMA", "QGMMA", "UTCHMMA", "UTCQMMA")
_ASYNC_COPY = ("LDGSTS", "UTMALDG", "UBLKCP")
#: Shared memory that the driver keeps for itself on sm_90 and later, outside the limit, and cuobjdump counts.
_RESERVED = 1024
#: Single bytes that a good kernel stores: flags of Blackwell's tensor memory.
_FEW_BYTES = 4
#: "/*01f0*/   @!P0 LDGSTS.E.BYPASS.128 [R4], ..." as cuobjdump prints it; the guard is optional.
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Census:
    """Counts of one kernel's machine code.

    Attributes:
        instructions: all of them, without padding.
        integer_mma, float_mma: tensor-core instructions.
        spill_loads, spill_stores: LDL and STL.
        byte_stores, byte_loads: single bytes to and from shared memory, the mark of an operand in the wrong order.
        async_copies: global memory to shared memory past the registers.
        waits: DEPBAR.
        registers: per thread.
        stack: bytes per thread.
        shared: bytes per program, static and dynamic, without what the driver reserves.
        opcodes: instructions by full name, for example "LDGSTS.E.BYPASS.128".
    """

    instructions: int
    integer_mma: int
    float_mma: int
    spill_loads: int
    spill_stores: int
    byte_stores: int
    byte_loads: int
    async_copies: int
    waits: int
    registers: int
    stack: int
    shared: int
    opcodes: Mapping[str, int] = field(repr=False)


def tool(name: str) -> Path:
    """A program of the CUDA toolkit that Triton's package contains.

    Raises:
        TargetError: Triton is not installed, or this build of it comes without the program.
    """
    path = triton_folder() / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise TargetError(f"reading machine code needs {name}, which {path.parent} does not contain; reinstall Triton")
    return path


def _dump(data: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        ran = subprocess.run(
            [tool("cuobjdump"), *options, file.name], capture_output=True, text=True, errors="replace", check=False
        )
    if ran.returncode:
        raise TargetError(f"cuobjdump cannot read a compiled kernel: {(ran.stderr or ran.stdout).strip()[-300:]}")
    return ran.stdout


def disassemble(data: bytes) -> str:
    """The machine code of a cubin as text."""
    return _dump(data, "-sass")


def census(data: bytes, shared: int = 0) -> Census:
    """Count what a cubin contains.

    Args:
        data: the ELF image.
        shared: bytes of dynamic shared memory it is launched with, which the image does not say.

    Raises:
        TargetError: the tool is missing, or `data` is not a cubin.
    """
    opcodes = Counter(_INSTRUCTION.findall(disassemble(data)))
    del opcodes["NOP"]
    by_name: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        by_name[opcode.partition(".")[0]] += count
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", _dump(data, "-res-usage"))
    if usage is None or not opcodes:
        raise TargetError("cuobjdump found no kernel in a compiled kernel")
    static = int(usage[3])
    return Census(
        instructions=opcodes.total(),
        integer_mma=sum(by_name[name] for name in _INTEGER_MMA),
        float_mma=sum(by_name[name] for name in _FLOAT_MMA),
        spill_loads=by_name["LDL"],
        spill_stores=by_name["STL"],
        byte_stores=opcodes["STS.U8"] + opcodes["STS.S8"],
        byte_loads=opcodes["LDS.U8"] + opcodes["LDS.S8"],
        async_copies=sum(by_name[name] for name in _ASYNC_COPY),
        waits=by_name["DEPBAR"],
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=shared + (static - _RESERVED if static >= _RESERVED else static),
        opcodes=dict(opcodes),
    )


def check(found: Census, arch: str, integer: bool) -> list[str]:
    """What is wrong with a kernel.

    Args:
        found: its counts.
        arch: what it was compiled for.
        integer: whether it multiplies matrices of integers, and nothing else, on the tensor cores.

    Returns:
        one sentence per violation, none for a good kernel.
    """
    wrong = []
    if found.registers > REGISTER_LIMIT:
        wrong.append(f"{found.registers} registers, allowed {REGISTER_LIMIT}")
    if found.shared > SHARED_LIMIT[arch]:
        wrong.append(f"{found.shared} bytes of shared memory, {arch} has {SHARED_LIMIT[arch]}")
    if found.spill_loads or found.spill_stores:
        wrong.append(f"registers spill: {found.spill_stores} stores, {found.spill_loads} loads")
    for count, what in ((found.byte_stores, "stores"), (found.byte_loads, "loads")):
        if integer and count > _FEW_BYTES:  # elsewhere they are transpositions of codes, such as the model's NCHW input
            wrong.append(f"{count} {what} of single bytes in shared memory: an operand is not K-major")
    if integer and not found.integer_mma:
        wrong.append("no integer tensor-core instruction")
    if integer and found.float_mma:
        wrong.append(f"{found.float_mma} floating-point tensor-core instructions in an integer kernel")
    return wrong
