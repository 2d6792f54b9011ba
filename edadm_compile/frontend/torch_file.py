"""Files of ``torch.save``, read without running what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edadm_compile.frontend.torch_file_check import check_torch_file
from edadm_compile.frontend.zip_check import is_zip

#: Trainers keep their own objects beside the weights. Objects of these packages are read as empty stand-ins.
_BOOKKEEPING = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "argparse.")


class _StandIn:
    """In the place of a trainer's object; whatever the file wants done with it is left out."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Leave out an item."""

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return self


def read_torch_file(path: Path, *, check: bool = True) -> Any:
    """The plain values and tensors of a file; tensors stay on the disk until they are used (memory map).

    The unpickler is torch's restricted one (``weights_only=True``). PyTorch Lightning checkpoints, such as those of latent
    diffusion, name classes of their trainer beside the weights; these are replaced by stand-ins, nothing is imported.

    Args:
        check: look the file through first (`torch_file_check`).

    Raises:
        InputError: sizes that are not those of the contents.
        Exception: of torch's, for a file that holds other objects or is none of torch's.
    """
    if check:
        check_torch_file(path)
    mapped = is_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception:
        foreign = _foreign_names(path) if mapped else []
        if not foreign or not all(name.startswith(_BOOKKEEPING) for name in foreign):
            raise
    stand_ins: list[Any] = [(_named(name), name) for name in foreign]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _foreign_names(path: Path) -> list[str]:
    """Names that the restricted unpickler would refuse; none when even that cannot be told."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file: the error of torch.load says so
        return []


def _named(name: str) -> type[_StandIn]:
    """A stand-in of its own for each name, so that two names do not become one dictionary key."""
    return type(name.rpartition(".")[2], (_StandIn,), {})
