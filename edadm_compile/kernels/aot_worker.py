"""A process that compiles kernels: requests as lines of JSON on standard input, results on standard output.

It is started with a clean environment (`edadm_compile.kernels.aot`), imports Triton, never torch, and needs no GPU.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import re
import sys
from typing import Any


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one `KernelRequest`; returns `Cubin`'s fields, the bytes as base64 under "data".

    Raises:
        Exception: whatever the compiler raises.
    """
    compiler: Any = importlib.import_module("triton.compiler")
    backends: Any = importlib.import_module("triton.backends.compiler")
    module, _, name = request["entry"].partition(":")
    function = getattr(importlib.import_module(module), name)
    types, constants = dict(request["arguments"]), dict(request["constants"])
    names = list(function.arg_names)
    if [n for n in names if n not in constants] != list(types) or {*names} != {*types, *constants}:
        raise TypeError(f"{name} takes ({', '.join(names)}), its registry entry gives {[*types, *constants]}")
    if function.is_gluon():
        gluon: Any = importlib.import_module("triton.experimental.gluon._runtime")
        make_source = gluon.GluonASTSource
    else:
        make_source = compiler.ASTSource
    source = make_source(
        function,
        {n: types.get(n, "constexpr") for n in names},
        constants,
        {(names.index(n),): [["tt.divisibility", 16]] for n in request["divisible"]},
    )
    options = {
        "num_warps": request["num_warps"],
        "num_stages": request["num_stages"],
        "enable_fp_fusion": request["fusion"],
    }
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # what ptxas says of registers and spills
        target = backends.GPUTarget("cuda", int(request["arch"].removeprefix("sm_")), 32)
        compiled = compiler.compile(source, target=target, options=options)
    return describe(compiled.metadata, compiled.asm["ptx"], compiled.asm["cubin"], log.getvalue())


def describe(metadata: Any, ptx: str, cubin: bytes, log: str) -> dict[str, Any]:
    """`Cubin`'s fields from the compiler's outputs.

    Raises:
        ValueError: the kernel needs memory that the launcher does not provide.
    """
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind, 0):
            raise ValueError(f"{kind} is {getattr(metadata, kind)} bytes: the launcher provides none")
    if getattr(metadata, "num_ctas", 1) != 1:
        raise ValueError("clusters of programs are not launched")
    entry = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*", ptx)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if entry is None or registers is None or spills is None:
        raise ValueError("the compiler's output has no entry point or no resource usage")
    threads = re.search(r"\.reqntid\s+(\d+)", entry[0])  # after warp specialisation, unlike the option
    return {
        "name": entry[1],
        "shared": metadata.shared,
        "num_warps": int(threads[1]) // 32 if threads else metadata.num_warps,
        "registers": int(registers[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "overlaps": "griddepcontrol.wait" in ptx,
        "params": re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", entry[2]),
        "data": base64.b64encode(cubin).decode(),
    }


def explain(error: BaseException) -> str:
    """One line that says what the compiler did not like: the last one of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Repro")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def main() -> None:
    """Serve until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the compiler prints goes to the log
    for line in sys.stdin:
        try:
            reply = compile_request(json.loads(line))
        except Exception as error:
            reply = {"error": explain(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
