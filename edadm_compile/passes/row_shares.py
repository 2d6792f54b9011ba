"""What reconstruction does when several processes each hold some of the samples."""

from __future__ import annotations

import torch
from torch import Tensor

from edadm_compile.errors import ParallelError
from edadm_compile.ir.program import Program
from edadm_compile.parallel.world import LocalRows, Share
from edadm_compile.passes.base import Context
from edadm_compile.quant.fake_quant import MaskPool


def check_divisible(program: Program, ctx: Context) -> None:
    """Refuse what cannot be divided before the samples are collected.

    Raises:
        ParallelError: a graph that takes one batch size alone, or fewer samples than processes.
    """
    size, signature = ctx.world.size, program.signature
    if size == 1 or ctx.config.reconstruction.iters == 0 or not ctx.config.recipe.phases:
        return
    if signature.min_batch == signature.max_batch:
        raise ParallelError(
            f"the model was captured for batches of {signature.max_batch} only, whose rows cannot be divided over "
            f"{size} processes; run it in one, or capture it with a batch dimension that is free"
        )
    samples = ctx.config.calib_samples * program.sampler.branches
    if samples < size:
        raise ParallelError(
            f"{samples} calibration samples for {size} processes: each needs one or more; raise --calib-samples or start "
            "fewer"
        )


def held_rows(ctx: Context) -> list[Tensor]:
    """Rows of the calibration set that this process holds."""
    inputs = ctx.calibration.inputs
    return ctx.world.share(inputs[0].shape[0]).of(inputs)


def share_of(samples: int, ctx: Context) -> Share:
    """The share that reconstruction works with.

    Args:
        samples: rows that the streams of this process hold; one process alone may have filled its set up to whole batches.
    """
    return ctx.world.share(samples if ctx.world.size == 1 else ctx.calibration.x.shape[0])


class DividedMasks(MaskPool):
    """QDrop masks of a batch of which this process computes some rows: drawn for the whole batch, and cut.

    Every process draws the same masks as one process alone would. A value without one row per sample (or without a
    multiple, such as heads times samples) gets a mask of its own shape.
    """

    _part: LocalRows | None = None

    def select(self, part: LocalRows) -> None:
        """Rows of the masks to come."""
        self._part = part if part.places.numel() < part.batch else None

    def take(self, shape: torch.Size) -> Tensor:
        """A boolean mask of `shape`."""
        part = self._part
        if part is None or not shape or shape[0] % part.places.numel():
            return super().take(shape)
        each = shape[0] // part.places.numel()
        whole = super().take(torch.Size((part.batch * each, *shape[1:])))
        return whole.view(part.batch, each, *shape[1:])[part.places].reshape(shape)
