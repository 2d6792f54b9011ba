"""Feature extractors for distances between sets of images: ``torch.export`` archives, images to features."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.frontend.archive_check import open_archive
from edadm_compile.frontend.exported import batch_range, is_exported_program

#: A file of this name beside the reference model is used when no other is given.
BESIDE = "features.pt2"
#: Images at a time, where the archive allows it.
_BATCH = 64
_EXPECTED = "expected a torch.export archive (.pt2) with images float32 [B, C, H, W] → features [B, d]"


@dataclass(frozen=True)
class Extractor:
    """A network from images to features.

    Attributes:
        path: file it came from.
        shape: [C, H, W] of the images it takes.
        dimension: d.
        min_batch, max_batch: images it takes at once.
        call: images float32 [B, C, H, W] in [-1, 1] → features [B, d].
    """

    path: Path
    shape: tuple[int, int, int]
    dimension: int
    min_batch: int
    max_batch: int
    call: Any

    def __call__(self, images: Tensor) -> Tensor:
        """Features float64 [N, d] of images float32 [N, C, H, W], any N.

        Raises:
            InputError: features that are not finite, or not [B, d].
        """
        parts = []
        with torch.no_grad():
            for piece in images.float().clamp(-1, 1).split(max(self.min_batch, min(_BATCH, self.max_batch))):
                missing = max(0, self.min_batch - len(piece))
                filled = torch.cat((piece, piece[-1:].expand(missing, *piece.shape[1:]))) if missing else piece
                parts.append(self.call(filled)[: len(piece)].double())
        features = torch.cat(parts)
        if features.shape != (len(images), self.dimension) or not bool(features.isfinite().all()):
            raise InputError(
                f"{self.path}: features are {list(features.shape)} or not finite, expected finite {[len(images), self.dimension]}"
            )
        return features


def load_extractor(path: Path, shape: tuple[int, ...]) -> Extractor:
    """Load an extractor for images of `shape` [C, H, W].

    Raises:
        InputError: unreadable, able to run code, or not a map from such images to features.
    """
    if not path.exists():
        raise InputError(f"--features {path} does not exist")
    if not is_exported_program(path):
        raise InputError(f"--features {path} is another kind of file; {_EXPECTED}")
    try:
        program = open_archive(path)
        call = program.module(check_guards=False)  # guards are code from the file; shapes are checked here
    except InputError:
        raise
    except (Exception, zipfile.BadZipFile, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--features {path} cannot be read by this torch {torch.__version__}: {reason}") from None
    names = [n for n in program.graph_signature.user_inputs if isinstance(n, str)]
    values: dict[str, Any] = {n.name: n.meta.get("val") for n in program.graph.nodes}
    outputs = [n for n in program.graph_signature.user_outputs if isinstance(n, str)]
    given: list[Any] = [values.get(n) for n in names]
    made: list[Any] = [values.get(n) for n in outputs]
    if len(given) != 1 or len(made) != 1 or _rank(given[0]) != 4 or _rank(made[0]) != 2:
        raise InputError(f"--features {path} maps {_shapes(given)} to {_shapes(made)}; {_EXPECTED}")
    found = tuple(given[0].shape[1:])
    if found != tuple(shape):
        raise InputError(
            f"--features {path} takes images {_text(found)}, the model makes {_text(shape)} (channels x height x width); "
            "export the extractor for that size, with any resizing in it"
        )
    low, high = batch_range(program, given[0])
    return Extractor(path, found, int(made[0].shape[1]), low, high, call)


def _rank(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else -1


def _shapes(values: list[Any]) -> str:
    return ", ".join(str(list(v.shape)) if isinstance(v, Tensor) else "no tensor" for v in values) or "nothing"


def _text(shape: tuple[Any, ...]) -> str:
    return "x".join(map(str, shape))
