"""Give memory that nothing holds any more back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return free pages to the system, where the C library has a call for it (glibc).

    The allocator of glibc takes blocks below 32 MB from one growing heap, and shrinks it from its end alone: what a stage
    has freed stays with the process as long as one small block lies above it. Without this call each stage would take
    its memory on top of the gaps that the stages before left.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
