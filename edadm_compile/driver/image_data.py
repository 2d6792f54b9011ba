"""Sets of real images to compare with: a folder of pictures, or an npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.frontend.zip_check import check_zip, is_zip

_SUFFIXES = (".png", ".jpg", ".jpeg")
_KEYS = ("x", "images", "arr_0")
_MODES = {1: "L", 3: "RGB"}
#: Pictures decoded at a time.
_BATCH = 256
#: Modes that Pillow converts to 8 bits per channel without cutting values off.
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class ImageData:
    """Real images, decoded batch by batch.

    Attributes:
        path: folder or file.
        shape: [C, H, W].
        items: paths of pictures, or one array [N, H, W, C] uint8 or [N, C, H, W] float.
    """

    path: Path
    shape: tuple[int, int, int]
    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def batches(self) -> Iterator[Tensor]:
        """Images float32 [B, C, H, W] in [-1, 1].

        Raises:
            InputError: a picture that cannot be decoded or has another size, or values outside of [-1, 1].
        """
        for start in range(0, len(self), _BATCH):
            part = self.items[start : start + _BATCH]
            if isinstance(part, list):
                yield torch.cat([_from_bytes(_decode(path, self.shape)[None]) for path in part])
            elif part.dtype == numpy.uint8:
                yield _from_bytes(part)
            else:
                yield _checked(self.path, torch.from_numpy(part.astype(numpy.float32)), start)


def open_data(path: Path, shape: tuple[int, ...]) -> ImageData:
    """Images of `shape` [C, H, W] from a folder (with its sub-folders) of png and jpg files, or from an npz file.

    Raises:
        InputError: what was found instead, and what is expected.
    """
    c, h, w = shape
    if path.is_dir():
        if c not in _MODES:
            raise InputError(f"--data {path}: pictures have 1 or 3 channels, the model makes {c}; give an npz file")
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"--data {path} holds no {', '.join(_SUFFIXES)} file")
        data = ImageData(path, (c, h, w), found)
    elif path.exists():
        data = ImageData(path, (c, h, w), _array(path, (c, h, w)))
    else:
        raise InputError(f"--data {path} does not exist; expected a folder of png or jpg files, or an npz file")
    if len(data) < 2:
        raise InputError(f"--data {path} holds {len(data)} image(s); a distance between sets needs 2 or more")
    return data


def _decode(path: Path, shape: tuple[int, int, int]) -> Any:
    """Pixels uint8 [H, W, C]."""
    c, h, w = shape
    try:
        with Image.open(path) as image:
            if image.size != (w, h):
                raise InputError(
                    f"--data: {path} has {image.height}x{image.width} pixels, the model makes {h}x{w} (height x width); "
                    "resize the pictures first: how that is done changes the distance"
                )
            if image.mode not in _EIGHT_BITS:
                raise InputError(f"--data: {path} has pixels of mode {image.mode!r}; allowed are 8 bits per channel")
            return numpy.asarray(image.convert(_MODES[c])).reshape(h, w, c)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--data: {path} cannot be decoded: {error}") from None


#: What numpy raises of a file that is not, or not soundly, what it writes (MemoryError: sizes that nothing can have).
_UNREADABLE = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError, NotImplementedError,
    MemoryError, KeyError, SyntaxError,
)  # fmt: skip


def _array(path: Path, shape: tuple[int, int, int]) -> Any:
    """The images of an npz file, of a legal type and layout."""
    try:
        if is_zip(path):
            check_zip(path)
        with numpy.load(path, allow_pickle=False) as archive:
            names = list(getattr(archive, "files", []))
            key = next((k for k in _KEYS if k in names), None)
            if key is None:
                raise InputError(
                    f"--data {path} holds {', '.join(names) or 'no array'}; expected a key {', '.join(_KEYS)}"
                )
            array = archive[key]
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise InputError(f"--data {path} is not an npz file of plain arrays: {reason}") from None
    c, h, w = shape
    expected = f"uint8 {['N', h, w, c]} or float {['N', c, h, w]} in [-1, 1]".replace("'", "")
    layout = (h, w, c) if array.dtype == numpy.uint8 else (c, h, w)
    if (array.dtype != numpy.uint8 and array.dtype.kind != "f") or array.shape[1:] != layout:
        raise InputError(f"--data {path}: {key} is {array.dtype} {list(array.shape)}, the model needs {expected}")
    return array


def _from_bytes(pixels: Any) -> Tensor:
    """uint8 [B, H, W, C] to float32 [B, C, H, W] in [-1, 1]."""
    return torch.from_numpy(numpy.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _checked(path: Path, images: Tensor, start: int) -> Tensor:
    low, high = float(images.min()), float(images.max())
    if not -1.001 <= low <= high <= 1.001:  # float16 and resized data may leave the range by a rounding; NaN fails too
        raise InputError(
            f"--data {path}: float values from {low:.4g} to {high:.4g} near image {start}; allowed -1 to 1 (scale with x / 127.5 - 1)"
        )
    return images
