"""A UNet in nobody's style: gated attention, post-norm, transposed convolutions, LayerNorm over (C, H, W), few SiLUs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SIZE = 8


class SinusoidalTime(nn.Module):
    """Own time embedding: sine and cosine, then an MLP with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000.0) / half))
        angles = t.float()[:, None] * frequencies
        return self.second(nn.functional.gelu(self.first(torch.cat((angles.sin(), angles.cos()), dim=1))))


class PostNormBlock(nn.Module):
    """conv -> norm -> act, twice, with an added time projection; no residual."""

    def __init__(self, channels_in: int, channels: int, time: int, act: nn.Module) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm_a = nn.GroupNorm(2, channels)
        self.time = nn.Linear(time, channels)
        self.conv_b = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_b = nn.GroupNorm(2, channels)
        self.act = act

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.act(self.norm_a(self.conv_a(x)))
        h = h + self.time(emb)[..., None, None]
        return self.act(self.norm_b(self.conv_b(h)))


class PreNormBlock(nn.Module):
    """LayerNorm over (C, H, W) before the activation, residual."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((channels, size, size))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(nn.functional.mish(self.conv(nn.functional.leaky_relu(self.norm(x), 0.1))))


class GatedSkip(nn.Module):
    """Attention U-Net's gate: ``sigmoid(psi(silu(theta(x) + phi(g)))) * x``, all 1x1 convolutions."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, inner, 1)
        self.phi = nn.Conv2d(channels, inner, 1, bias=False)
        self.psi = nn.Conv2d(inner, 1, 1)

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        return torch.sigmoid(self.psi(nn.functional.silu(self.theta(x) + self.phi(g)))) * x


class ForeignUNet(nn.Module):
    """Two resolutions; ``forward(x, t)``, or ``forward(x, t, y)`` with class labels."""

    def __init__(self, channels: int = 8, labels: int = 0) -> None:
        super().__init__()
        self.in_channels, self.image_size = 3, SIZE
        time, wide = 16, channels + 4  # channel counts that are no powers of two
        self.time = SinusoidalTime(time)
        self.label = nn.Embedding(labels, time) if labels else None
        self.stem = nn.Conv2d(3, channels, 5, padding=2)
        self.down_block = PostNormBlock(channels, channels, time, nn.GELU())
        self.down = nn.Conv2d(channels, wide, 4, stride=2, padding=1)
        self.mid_a = PostNormBlock(wide, wide, time, nn.ReLU())
        self.mid_b = PreNormBlock(wide, SIZE // 2)
        self.up = nn.ConvTranspose2d(wide, channels, 4, stride=2, padding=1)
        self.gate = GatedSkip(channels, 6)
        self.up_block = PostNormBlock(2 * channels, channels, time, nn.Mish())
        self.head = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time(t)
        if self.label is not None and y is not None:
            emb = emb + self.label(y)
        skip = self.down_block(self.stem(x), emb)
        h = self.mid_b(self.mid_a(self.down(skip), emb))
        h = self.up(h)
        h = torch.cat((h, self.gate(skip, h)), dim=1)
        return self.head(self.up_block(h, emb))


class LabelledUNet(ForeignUNet):
    """The same with a required label."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y)


def build() -> nn.Module:
    """A random model, the same on every call."""
    return _seeded(ForeignUNet)


def build_with_labels() -> nn.Module:
    """The class-conditional one, 4 labels."""
    return _seeded(lambda: LabelledUNet(labels=4))


def build_nothing() -> str:
    """A factory that returns no module."""
    return "not a module"


def build_and_fail() -> nn.Module:
    """A factory that raises."""
    raise RuntimeError("no weights on this planet")


def _seeded(make: type[nn.Module] | object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        module: nn.Module = make()  # type: ignore[operator]
    return module.eval()
