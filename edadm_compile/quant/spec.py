"""Integer formats: how many bits, which codes, which scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edadm_compile.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Activation widths with an integer lowering. 16 is executed as two int8 terms (see `split_hi_lo`).
ACT_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
#: Weight widths. Up to 4 bits are stored two per byte, 5 to 8 bits one per byte.
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class QuantSpec:
    """The code range of one quantized tensor.

    Attributes:
        bits: width of a code.
        symmetric: zero_point is 0 for every channel.
        axis: channel dimension that has its own scale, or None for one scale per tensor.
        qmin, qmax: smallest and largest code.
    """

    bits: int
    symmetric: bool
    axis: int | None
    qmin: int
    qmax: int

    @property
    def dtype(self) -> torch.dtype:
        """Container type of the codes: int8, or int16 for 16-bit activations."""
        import torch  # not at the top: the command line reads the allowed widths before anything heavy is loaded

        return torch.int16 if self.bits == 16 else torch.int8


def act_spec(bits: int, symmetric: bool = False) -> QuantSpec:
    """Spec of a per-tensor activation.

    A 16-bit code is executed as ``256 * hi + lo`` with int8 terms; ``hi`` must not exceed 127, hence
    ``qmax = 127 * 256 + 127``. 16 bits are always symmetric: the resolution makes an offset pointless.

    Raises:
        ConfigError: `bits` is not one of `ACT_BITS`.
    """
    if bits not in ACT_BITS:
        raise ConfigError(f"activation bits: got {bits}, allowed {', '.join(map(str, ACT_BITS))}")
    if bits == 16:
        return QuantSpec(16, True, None, -(2**15), 127 * 256 + 127)
    return QuantSpec(bits, symmetric, None, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def weight_spec(bits: int, axis: int = 0) -> QuantSpec:
    """Spec of a per-output-channel symmetric weight: int8 in [-127, 127], narrower ones use the full range.

    Raises:
        ConfigError: `bits` is not one of `WEIGHT_BITS`.
    """
    if bits not in WEIGHT_BITS:
        raise ConfigError(f"weight bits: got {bits}, allowed {', '.join(map(str, WEIGHT_BITS))}")
    qmin = -127 if bits == 8 else -(2 ** (bits - 1))
    return QuantSpec(bits, True, axis, qmin, 2 ** (bits - 1) - 1)
