"""The compiling processes: started clean, ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Variables that change what Triton generates: they must not leak into files that are shipped and cached.
_STEERING = ("TRITON_", "MLIR_", "LLVM_", "PTXAS_", "NVPTX_", "DISABLE_", "ENABLE_", "USE_IR_LOC", "PYTHONPATH")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(scratch: Path) -> dict[str, str]:
    """Variables of a compiling process: those of this one, without what steers Triton; temporary files in `scratch`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_STEERING)}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        "TMPDIR": str(scratch),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TRITON_DISABLE_LINE_INFO": "1",  # no paths of this machine in the code, and the same bytes everywhere
        "TRITON_DUMP_PTXAS_LOG": "1",
        "OMP_NUM_THREADS": "1",
    }


class Worker:
    """One process of `edadm_compile.kernels.aot_worker`.

    Args:
        scratch: folder for temporary files.
        number: tells workers apart.
    """

    def __init__(self, scratch: Path, number: int) -> None:
        self.stopped = False
        self._log = scratch / f"worker{number}.log"
        with self._log.open("wb") as log:
            # Its own session: Ctrl-C reaches this process alone, which then ends the group with ptxas in it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edadm_compile.kernels.aot_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(scratch),
                start_new_session=True,
            )

    def ask(self, request: str) -> dict[str, Any]:
        """Send a line of JSON and wait for the reply; a process that dies is a reply with an "error"."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(f"{request}\n".encode())
            stdin.flush()
            reply: dict[str, Any] = json.loads(stdout.readline())
            if reply.get("error", "").startswith("RuntimeError"):  # the diagnosis of a failed MLIR pass is in the log
                reply["error"] += self._last_words()
            return reply
        except (OSError, ValueError):
            self.stopped = True
            code = self._process.wait()
            ended = f"signal {-code}" if code < 0 else f"status {code}"
            return {"error": f"the compiler ended with {ended}{self._last_words()}"}

    def stop(self) -> None:
        """End the process and everything it started."""
        self.stopped = True
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "error:" in line or "Assertion" in line] or lines
        return f"; {told[-1][:300]}" if told else ""
