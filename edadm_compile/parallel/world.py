"""What passes need of several processes, and the one process that needs nothing.

All processes run the same program in lockstep, with the same random generators. They differ in which rows of a batch they
compute, and meet in three operations: sums, values of the first process, and rows joined in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class World:
    """One process alone: sums are its own values, and its share is everything.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def share(self, total: int) -> Share:
        """The rows of `total` that this process holds: neighbouring ones, a remainder goes to the first processes."""
        each, rest = divmod(total, self.size)
        start = self.rank * each + min(self.rank, rest)
        return Share(self, start, start + each + (self.rank < rest), total)

    def turns(self, count: int) -> range:
        """Those of `count` independent pieces of work that are this process's."""
        return range(self.rank, count, self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, the same bits on all of them."""

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first process."""

    def join(self, value: Tensor, share: Share) -> Tensor:
        """The rows of all processes in order.

        Args:
            value: [k n, ...] for a share of n rows; a process without rows gives those of one row, which do not count.
        """
        return value


@dataclass(frozen=True)
class Share:
    """The rows of a set, or of a batch, that one process holds.

    Attributes:
        start, stop: first row, and one behind the last.
        total: rows of all processes together.
    """

    world: World
    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        """Rows held."""
        return self.stop - self.start

    @property
    def weight(self) -> float:
        """Share of the rows, the weight of a mean over them."""
        return self.count / self.total

    def of(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The rows held, of tensors [total, ...]; one row where none is held, because no model runs on an empty batch."""
        if self.count == self.total:
            return list(values)
        return [v[self.start : self.stop] if self.count else v[:1] for v in values]

    def local(self, rows: Tensor) -> LocalRows:
        """Those of a batch of rows that are held here.

        Args:
            rows: int64 [B], indices into the whole set.
        """
        if self.count == self.total:
            return LocalRows(rows, 1.0, torch.arange(rows.numel()), rows.numel())
        places = ((rows >= self.start) & (rows < self.stop)).nonzero().flatten()
        if not places.numel():
            return LocalRows(torch.zeros(1, dtype=torch.int64), 0.0, torch.zeros(1, dtype=torch.int64), rows.numel())
        return LocalRows(rows[places] - self.start, places.numel() / rows.numel(), places, rows.numel())

    def sums(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums of scalars over all processes."""
        total = torch.stack(list(values))
        self.world.add([total])
        return list(total.unbind())


@dataclass(frozen=True)
class LocalRows:
    """The part of a batch that one process computes.

    Attributes:
        rows: int64 [b], indices into the rows held; the first of them where the batch has none of these.
        weight: b / B, or 0: what a mean over `rows` counts in the mean over the batch.
        places: int64 [b], where `rows` are in the batch.
        batch: B.
    """

    rows: Tensor
    weight: float
    places: Tensor
    batch: int


def divided(model: Callable[..., Tensor], world: World) -> Callable[..., Tensor]:
    """A model that each process runs on its share of the rows, with the rows of all as its result.

    Whoever calls it, a sampler say, then does the same on every process and draws the same random numbers.

    Args:
        model: from tensors [B, ...] to a tensor [B, ...].
    """
    if world.size == 1:
        return model

    def call(*inputs: Any) -> Tensor:
        share = world.share(inputs[0].shape[0])
        return world.join(model(*share.of(inputs)), share)

    return call
