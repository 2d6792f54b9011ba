"""CIFAR-10 images and labels from an npz file that the user has."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

#: Names of an array of pixels, uint8 [N, 32, 32, 3].
_PIXELS = ("x", "images", "arr_0", "data")
_LABELS = ("labels", "y", "arr_1")
_SIDE = 32


@dataclass(frozen=True)
class Images:
    """A set of images.

    Attributes:
        pixels: uint8 [N, 3, 32, 32].
        labels: int64 [N], or None where the file has none.
    """

    pixels: Tensor
    labels: Tensor | None

    def to(self, device: str) -> Images:
        """The same on a device."""
        return Images(self.pixels.to(device), None if self.labels is None else self.labels.to(device))


def scaled(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def load_images(path: Path) -> Images:
    """Read an npz file of plain arrays; no pickle is opened.

    Two layouts: pixels uint8 [N, 32, 32, 3] (key ``x``, ``images``, ``arr_0`` or ``data``), or encoded pictures: ``jpeg``
    (uint8, the files one after the other) with ``offsets`` (int64 [N + 1]). Labels are optional (``labels``, ``y`` or
    ``arr_1``, integers 0 to 9).

    Raises:
        SystemExit: what the file holds instead.
    """
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise SystemExit(f"--data {path} is not an npz file of plain arrays: {error}") from None
    labels = next((arrays[k] for k in _LABELS if k in arrays), None)
    if {"jpeg", "offsets"} <= set(arrays):
        pixels = _decoded(arrays["jpeg"], arrays["offsets"])
    else:
        found = next((arrays[k] for k in _PIXELS if k in arrays), None)
        if found is None or found.dtype != numpy.uint8 or found.shape[1:] != (_SIDE, _SIDE, 3):
            held = ", ".join(f"{k} {v.dtype} {list(v.shape)}" for k, v in arrays.items())
            raise SystemExit(
                f"--data {path} holds {held}; expected x uint8 [N, 32, 32, 3], or jpeg uint8 with offsets int64 [N + 1]"
            )
        pixels = found
    if labels is not None and len(labels) != len(pixels):
        raise SystemExit(f"--data {path} holds {len(pixels)} images and {len(labels)} labels")
    given = None if labels is None else torch.from_numpy(labels.astype(numpy.int64))
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), given)


def _decoded(data: Any, offsets: Any) -> Any:
    """Pixels uint8 [N, 32, 32, 3] of pictures stored one after the other."""
    pixels = numpy.empty((len(offsets) - 1, _SIDE, _SIDE, 3), numpy.uint8)
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        with Image.open(io.BytesIO(data[start:end].tobytes()), formats=("JPEG", "PNG")) as image:
            if image.size != (_SIDE, _SIDE):
                raise SystemExit(f"--data: picture {i} has {image.size[0]}x{image.size[1]} pixels, expected 32x32")
            pixels[i] = numpy.asarray(image.convert("RGB"))
    return pixels
