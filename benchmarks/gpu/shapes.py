"""Layer shapes of published diffusion UNets, generated from their configurations.

A 1x1 convolution is a linear layer over pixels, and layers on the same codes (q, k, v) are one: that is how they run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Conv:
    """[B, channels, height, width] -> [B, outputs, ...]; sizes are those in memory, before upsampling."""

    channels: int
    outputs: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    upsample: int = 1

    @property
    def operations(self) -> int:
        """Multiplications and additions for one image."""
        pixels = self.height * self.width * self.upsample**2 // self.stride**2
        return 2 * pixels * self.weights

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.outputs * self.channels * self.kernel**2


@dataclass(frozen=True)
class Linear:
    """[B * rows, channels] -> [B * rows, outputs]."""

    rows: int
    channels: int
    outputs: int

    @property
    def operations(self) -> int:
        """As `Conv.operations`."""
        return 2 * self.rows * self.weights

    @property
    def weights(self) -> int:
        """As `Conv.weights`."""
        return self.outputs * self.channels


@dataclass(frozen=True)
class Norm:
    """Group norm with SiLU over [B, channels, pixels]."""

    channels: int
    pixels: int
    groups: int = 32
    operations: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Attention:
    """q [B, queries, heads, size], k and v [B, keys, heads, size]."""

    queries: int
    keys: int
    heads: int
    size: int
    weights: int = 0

    @property
    def operations(self) -> int:
        """As `Conv.operations`, both products."""
        return 4 * self.queries * self.keys * self.heads * self.size


Shape = Conv | Linear | Norm | Attention


@dataclass(frozen=True)
class UNet:
    """A configuration.

    Attributes:
        inputs: channels in and out.
        size: height and width.
        channels: of each level.
        blocks: residual blocks of a level on the way down; one more on the way up.
        heads: of the attention in each level, 0 for none; the last one also in the middle.
        depth: transformer blocks in each level; 0 for plain attention without context.
        context: width and length of the context, (0, 0) for none.
        extra: linear layers that exist once per image: (inputs, outputs).
        groups: of the norms.
    """

    inputs: int
    size: int
    channels: tuple[int, ...]
    blocks: int
    heads: tuple[int, ...]
    depth: tuple[int, ...]
    context: tuple[int, int] = (0, 0)
    extra: tuple[tuple[int, int], ...] = ()
    groups: int = 32

    def shapes(self) -> Counter[Shape]:
        """How often each shape occurs in one evaluation."""
        return _Table(self).build()


class _Table:
    """Walks a configuration as the models are built (Ho et al. 2020; Rombach et al. 2022; diffusers)."""

    def __init__(self, config: UNet) -> None:
        self.config, self.found = config, Counter[Shape]()
        self.time = 4 * config.channels[0]

    def build(self) -> Counter[Shape]:
        c, size = self.config, self.config.size
        first, last = c.channels[0], len(c.channels) - 1
        for inputs, outputs in ((first, self.time), (self.time, self.time), *c.extra):
            self.found[Linear(1, inputs, outputs)] += 1
        self.found[Conv(c.inputs, first, size, size)] += 1
        skips, width = [first], first
        for level, channels in enumerate(c.channels):
            for _ in range(c.blocks):
                self.residual(width, channels, size)
                self.attend(level, channels, size)
                width = channels
                skips.append(width)
            if level < last:
                self.found[Conv(width, width, size, size, stride=2)] += 1
                size //= 2
                skips.append(width)
        self.residual(width, width, size)
        self.attend(last, width, size, middle=True)
        self.residual(width, width, size)
        for level in reversed(range(len(c.channels))):
            for _ in range(c.blocks + 1):
                self.residual(width + skips.pop(), c.channels[level], size)
                width = c.channels[level]
                self.attend(level, width, size)
            if level:
                self.found[Conv(width, width, size, size, upsample=2)] += 1
                size *= 2
        self.norm(first, size)
        self.found[Conv(first, c.inputs, size, size)] += 1
        return self.found

    def norm(self, channels: int, size: int) -> None:
        self.found[Norm(channels, size * size, self.config.groups)] += 1

    def residual(self, inputs: int, outputs: int, size: int) -> None:
        self.norm(inputs, size)
        self.found[Conv(inputs, outputs, size, size)] += 1
        self.found[Linear(1, self.time, outputs)] += 1
        self.norm(outputs, size)
        self.found[Conv(outputs, outputs, size, size)] += 1
        if inputs != outputs:
            self.found[Linear(size * size, inputs, outputs)] += 1

    def attend(self, level: int, channels: int, size: int, middle: bool = False) -> None:
        c, pixels = self.config, size * size
        # the models of the table with a context have attention in the middle even where the last level has none
        heads = c.heads[level] or (max(c.heads) if middle else 0)
        if not heads:
            return
        depth = c.depth[level] or (max(c.depth) if middle else 0)
        self.norm(channels, size)
        if not depth:
            self.found[Linear(pixels, channels, 3 * channels)] += 1
            self.found[Attention(pixels, pixels, heads, channels // heads)] += 1
            self.found[Linear(pixels, channels, channels)] += 1
            return
        self.found[Linear(pixels, channels, channels)] += 2  # into and out of the transformer
        for _ in range(depth):
            self.found[Linear(pixels, channels, 3 * channels)] += 1
            self.found[Attention(pixels, pixels, heads, channels // heads)] += 1
            self.found[Linear(pixels, channels, channels)] += 3  # out, then q and out of the cross attention
            self.found[Linear(c.context[1], c.context[0], 2 * channels)] += 1
            self.found[Attention(pixels, c.context[1], heads, channels // heads)] += 1
            self.found[Linear(pixels, channels, 8 * channels)] += 1
            self.found[Linear(pixels, 4 * channels, channels)] += 1


MODELS = {
    # google/ddpm-cifar10-32
    "ddim-cifar10": UNet(3, 32, (128, 256, 256, 256), 2, (0, 1, 0, 0), (0, 0, 0, 0)),
    # CompVis latent-diffusion, lsun_bedrooms and lsun_churches style: 224 channels, 32 per head
    "ldm4-lsun": UNet(3, 64, (224, 448, 672, 896), 2, (0, 14, 21, 28), (0, 0, 0, 0)),
    # CompVis latent-diffusion, cin256-v2: one class token as the context
    "ldm4-imagenet": UNet(3, 64, (192, 384, 576, 960), 2, (0, 12, 18, 30), (0, 1, 1, 1), (512, 1)),
    # runwayml/stable-diffusion-v1-5, 512 x 512
    "sd15": UNet(4, 64, (320, 640, 1280, 1280), 2, (8, 8, 8, 0), (1, 1, 1, 0), (768, 77)),
    # stabilityai/stable-diffusion-xl-base-1.0, 1024 x 1024
    "sdxl": UNet(
        4, 128, (320, 640, 1280), 2, (0, 10, 20), (0, 2, 10), (2048, 77), ((2816, 1280), (1280, 1280))
    ),
    # nothing published: for dry runs
    "tiny": UNet(3, 8, (16, 32), 1, (0, 2), (0, 1), (24, 5), groups=8),
}  # fmt: skip


def table(name: str) -> Counter[Shape]:
    """Shapes of one model and how often they occur.

    Raises:
        KeyError: unknown model.
    """
    return MODELS[name].shapes()
