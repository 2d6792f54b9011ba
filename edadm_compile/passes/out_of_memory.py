"""Running out of memory as an error of the package that says where and what to reduce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edadm_compile.errors import ResourceError

#: How torch's allocators and the system say it; the CPU's has no exception class of its own.
_PHRASES = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(p in str(error).lower() for p in _PHRASES)


@contextmanager
def memory_guard(place: str, advice: str) -> Iterator[None]:
    """Turn running out of memory into a `ResourceError`.

    Args:
        place: what was being done, such as "reconstructing block 3/12 down.0".
        advice: what to reduce.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).splitlines()
        reason = f" ({lines[-1][:200]})" if lines else ""
        raise ResourceError(f"out of memory while {place}{reason}; {advice}") from None
