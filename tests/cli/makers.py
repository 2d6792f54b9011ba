"""Models that `--factory` builds for the table of errors."""

import torch
from torch import nn

from tests.graphs import TinyUNet


class Small(nn.Module):
    """One convolution; what `forward` does with x is up to `change`."""

    def __init__(self, change=lambda value: value, size=8):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.change = change
        if size:
            self.image_size = size

    def forward(self, x, t):
        return self.change(self.conv(x))


class OneInput(Small):
    def forward(self, x):
        return self.conv(x)


class Context(Small):
    def forward(self, x, t, context):
        return self.conv(x) + context.mean()


class Labelled(Small):
    """A label of 4, and one more embedding than `num_classes` says only where `classes` is 4."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)

    def forward(self, x, t, y):
        return self.conv(x) + self.table(y)[:, :, None, None]


class WholeTimesteps(Small):
    """Takes integer timesteps alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 3)

    def forward(self, x, t):
        return self.conv(x) + self.table(t)[:, :, None, None]


class Branching(Small):
    """Cannot be captured: what it does depends on values."""

    def forward(self, x, t):
        h = self.conv(x)
        return h if float(h.sum()) > 0 else -h


def small():
    return Small()


def unsized():
    return Small(size=0)


def one_input():
    return OneInput()


def context():
    return Context()


def labelled():
    return Labelled()


def whole_timesteps():
    return WholeTimesteps()


def branching():
    return Branching()


def nan():
    return Small(lambda value: value * float("nan"))


def zero():
    return Small(lambda value: value * 0)


def wide():
    return Small(lambda value: value.repeat(1, 3, 1, 1))


def crash():
    return Small(lambda value: value[:, :, :, 99])


def text():
    return "not a module"


def sorting():
    """Uses an operator outside of the table."""
    return Small(lambda value: value.sort(dim=1).values)


class Features(nn.Module):
    """An extractor: the mean of each channel."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Hidden(Small):
    """Keeps a copy of its weight that the capture cannot see."""

    def forward(self, x, t):
        with torch.no_grad():
            shift = float(self.conv.weight.detach().sum()) if not torch.compiler.is_compiling() else 0.0
        return x + shift


def hidden():
    return Hidden()


def tiny():
    return TinyUNet(classes=5)


class Spoilt(TinyUNet):
    """Its prediction times `factor`."""

    def __init__(self, factor):
        super().__init__(classes=5)
        self.factor = factor

    def forward(self, x, t, label):
        return super().forward(x, t, label) * self.factor


def tiny_nan():
    return Spoilt(float("nan"))


def tiny_zero():
    return Spoilt(0.0)
