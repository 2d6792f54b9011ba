"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): the doubled batch and how its halves are joined.

The rows of a doubled batch are those of diffusers' pipelines: [0, B) without the condition, [B, 2B) with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.ir.program import SamplerSpec


def doubled(spec: SamplerSpec, x: Tensor) -> Tensor:
    """`x` [B, ...] for both branches [2B, ...]; unchanged without guidance."""
    return torch.cat((x, x)) if spec.guided else x


def null_rows(spec: SamplerSpec, conditions: Sequence[Tensor]) -> list[Tensor]:
    """Conditions [B, ...] of the unconditional branch for those of the conditional one.

    Raises:
        InputError: the sampler has no unconditional branch.
    """
    if not spec.null or all(row is None for row in spec.null):
        raise InputError(
            f"guidance {spec.guidance:g} needs the unconditional branch: give --null-label K for class labels, or "
            "--uncond FILE.safetensors or --uncond zeros for other conditions"
        )
    pairs = zip(conditions, spec.null, strict=True)
    return [c if row is None else row.to(c.dtype).expand_as(c) for c, row in pairs]


def both_branches(spec: SamplerSpec, conditions: Sequence[Tensor]) -> list[Tensor]:
    """Conditions [2B, ...] of the doubled batch; those given, without guidance.

    Raises:
        InputError: as `null_rows`.
    """
    if not spec.guided:
        return list(conditions)
    return [torch.cat(pair) for pair in zip(null_rows(spec, conditions), conditions, strict=True)]


def interleaved(spec: SamplerSpec, conditions: Sequence[Tensor]) -> list[Tensor]:
    """Conditions [2N, ...] that belong to ``x.repeat_interleave(2, 0)``: without, with, without, with, ...

    Raises:
        InputError: as `null_rows`.
    """
    pairs = zip(null_rows(spec, conditions), conditions, strict=True)
    return [torch.stack(pair, dim=1).flatten(0, 1) for pair in pairs]


def combine(spec: SamplerSpec, prediction: Tensor, channels: int) -> Tensor:
    """The prediction [B, K, ...] that the sampler uses, from that of the doubled batch [2B, K, ...].

    ``u + s (c - u)`` for the first `channels`; a learned variance behind them is that of the conditional branch, as in
    diffusers' IF pipeline. The formula is linear, so it holds for noise, v and x0 alike.
    """
    if not spec.guided:
        return prediction
    without, with_condition = prediction.chunk(2)
    joined = without + spec.guidance * (with_condition - without)
    if prediction.shape[1] > channels:
        joined = torch.cat((joined[:, :channels], with_condition[:, channels:]), dim=1)
    return joined


def labels_in_turn(n: int, classes: int, null: Tensor | None = None) -> Tensor:
    """Labels 0, 1, 2, ... int64 [n] of `classes` embeddings, leaving out the null label where it is one of them."""
    missing = None if null is None or not 0 <= int(null) < classes else int(null)
    labels = torch.arange(n) % (classes - (missing is not None))
    return labels if missing is None else labels + (labels >= missing)
