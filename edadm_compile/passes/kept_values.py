"""A sample of values that is kept while the values themselves come and go."""

from __future__ import annotations

import torch
from torch import Tensor


class KeptValues:
    """Float32 rows, added batch by batch.

    With room reserved before the first large value is allocated they take no more than that. Kept tensors that are
    allocated one by one, each in the gap that the last large value left, leave gaps that the next large values do not fit
    into: the process then grows by about the size of all values of a forward.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0)
        self._filled = 0

    def reserve(self, rows: int, *shape: int) -> None:
        """Room for `rows` rows of `shape` in all."""
        assert self._filled == 0, "rows are kept already"
        self._room = torch.empty((rows, *shape))

    def add(self, rows: Tensor) -> None:
        """Keep `rows` [n, ...]."""
        end = self._filled + rows.shape[0]
        if end > self._room.shape[0]:
            self._room = torch.cat((self.values, rows)) if self._filled else rows
        else:
            self._room[self._filled : end] = rows
        self._filled = end

    @property
    def values(self) -> Tensor:
        """All rows so far, in order."""
        return self._room[: self._filled]
