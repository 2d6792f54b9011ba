"""Ranges of convolution outputs, channel by channel, for engines whose integer convolution writes codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from edadm_compile.errors import CalibrationError
from edadm_compile.passes.kept_values import KeptValues
from edadm_compile.quant.observers import affine_from_range, search_outputs
from edadm_compile.quant.spec import act_spec

#: Values kept of each channel, over the whole calibration set.
KEEP = 2_000


@dataclass
class ChannelObserver:
    """Running minimum, maximum and a subsample of each channel of [B, C, H, W]."""

    low: Tensor | None = None
    high: Tensor | None = None
    kept: KeptValues = field(default_factory=KeptValues)

    def update(self, x: Tensor, keep: int, generator: torch.Generator) -> None:
        """Take in one batch; `keep` positions of it stay."""
        low, high = x.amin(dim=(0, 2, 3)), x.amax(dim=(0, 2, 3))
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        pixels = x.shape[2] * x.shape[3]
        total = x.shape[0] * pixels
        picked = torch.randint(0, total, (min(keep, total),), generator=generator)
        self.kept.add(x.flatten(2)[picked // pixels, :, picked % pixels])

    def affine(self, name: str, *, minmax: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point of 8-bit codes, float32 [C].

        Raises:
            CalibrationError: a value is not finite.
        """
        assert self.low is not None and self.high is not None
        if not bool((self.high - self.low < float("inf")).all()):
            raise CalibrationError(f"the output of {name} is not finite on the calibration set")
        if minmax:
            return affine_from_range(self.low, self.high, act_spec(8))
        return search_outputs(self.kept.values, self.low, self.high, act_spec(8))
