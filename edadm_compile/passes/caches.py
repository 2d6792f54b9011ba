"""Values of all calibration samples, in memory up to a limit and in memory-mapped files beyond it."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edadm_compile.errors import ResourceError


@dataclass
class CacheUse:
    """Bytes in use, and the most at any time.

    Attributes:
        memory, memory_peak: in ordinary memory.
        spilled, spilled_peak: in files.
        written: put into files in total.
    """

    memory: int = 0
    memory_peak: int = 0
    spilled: int = 0
    spilled_peak: int = 0
    written: int = 0


class Caches:
    """Room for tensors with one row per sample.

    A tensor goes into ordinary memory while all of them together stay within the limit, else into a file that is
    mapped into memory: the system keeps as much of it in memory as is free and writes the rest to disk. Files have no
    name, so that nothing is left of them when the process ends, however it ends. Values are the same either way.

    Args:
        limit: bytes in ordinary memory; None for no limit.
        folder: where files go; needed with a limit.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._sizes: dict[int, tuple[int, bool]] = {}
        self.use = CacheUse()

    def empty(self, rows: int, like: Tensor) -> Tensor:
        """Room for `rows` rows of the shape, type and memory format of `like` [B, ...], uninitialised.

        Raises:
            ResourceError: no space in the folder for what exceeds the limit.
        """
        strides = _joined_strides(like)
        shape = (rows, *like.shape[1:])
        count = math.prod(shape)
        size = count * like.element_size()
        spill = self._limit is not None and self.use.memory + size > self._limit and size > 0
        flat = self._mapped(count, like.dtype, size) if spill else torch.empty(count, dtype=like.dtype)
        self._count(flat, size, spill)
        return flat.as_strided(shape, strides)

    def keep(self, value: Tensor) -> Tensor:
        """`value` itself where it fits into the limit, else a copy in a file.

        Raises:
            ResourceError: as `empty`.
        """
        size = value.numel() * value.element_size()
        if self._limit is None or self.use.memory + size <= self._limit:
            self._count(value, size, spilled=False)
            return value
        room = self.empty(value.shape[0], value)
        room.copy_(value)
        return room

    def mean_square(self, value: Tensor) -> Tensor:
        """``value.float().square().mean()``, bit for bit, without a copy of [N, ...] in memory beyond the limit."""
        scratch = self.empty(value.shape[0], value[:2].float())
        mean = scratch.copy_(value).square_().mean()
        self.release(scratch)
        return mean

    def release(self, *values: Tensor) -> None:
        """Values from here that nobody reads any more; their memory is free once the last reference is gone."""
        for value in values:
            size, spilled = self._sizes.pop(value.untyped_storage()._cdata, (0, False))
            if spilled:
                self.use.spilled -= size
            else:
                self.use.memory -= size

    def report(self) -> dict[str, int | None]:
        """Limit, peaks and bytes written, as plain values."""
        use = self.use
        return {
            "limit": self._limit,
            "memory_peak": use.memory_peak,
            "spilled_peak": use.spilled_peak,
            "spilled_total": use.written,
        }

    def _count(self, value: Tensor, size: int, spilled: bool) -> None:
        use, key = self.use, value.untyped_storage()._cdata
        if size == 0 or key in self._sizes:
            return
        self._sizes[key] = (size, spilled)
        if spilled:
            use.spilled += size
            use.written += size
            use.spilled_peak = max(use.spilled_peak, use.spilled)
        else:
            use.memory += size
            use.memory_peak = max(use.memory_peak, use.memory)

    def _mapped(self, count: int, dtype: torch.dtype, size: int) -> Tensor:
        """`count` values in a nameless file."""
        assert self._folder is not None, "a limit needs a folder"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as stream:
                # Blocks are reserved now: a full disk is an error here, where writing to the map would kill the process.
                os.posix_fallocate(stream.fileno(), 0, size)
                room = mmap.mmap(stream.fileno(), size)
        except OSError as error:
            raise ResourceError(
                f"cannot spill {size / 1e6:.1f} MB of caches to {self._folder}: {error.strerror or error}; free space "
                "there, name another folder with --workdir, or allow more with --memory"
            ) from None
        return torch.frombuffer(room, dtype=dtype, count=count)  # keeps the map open as long as it lives


def _joined_strides(value: Tensor) -> tuple[int, ...]:
    """Strides that `torch.cat` gives to the join of batches such as `value`: channels-last images stay so.

    The kernel of a convolution, and with it the last bits of its result, depends on them.
    """
    batch = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.cat([batch, batch]).stride()
