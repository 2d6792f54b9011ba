"""How much memory this process holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_bytes() -> int | None:
    """Resident set of the process, bytes; the peak where the system (macOS) tells no more; None where it tells nothing."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_bytes() -> int | None:
    """Memory in use on the current GPU by all processes, bytes; None unless this process has started CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def memory_text() -> str:
    """Such as "1.24 GB" or "1.24 GB, GPU 3.10 GB"; "" where nothing is known."""
    resident, gpu = resident_bytes(), gpu_bytes()
    parts = [] if resident is None else [f"{resident / 1e9:.2f} GB"]
    parts += [] if gpu is None else [f"GPU {gpu / 1e9:.2f} GB"]
    return ", ".join(parts)
