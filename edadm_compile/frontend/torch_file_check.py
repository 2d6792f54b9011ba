"""Files of ``torch.save``, looked through before torch opens them: sizes, storages and tensors that fit the file."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import IO

from edadm_compile.errors import InputError
from edadm_compile.frontend.inert_pickle import Contents, contents_of
from edadm_compile.frontend.zip_check import check_zip, is_zip

#: Elements of a tensor that may be more than its storage has (an expanded one is written out when it is converted).
_EXPANDED = 1 << 22
#: A file in the format before torch 1.6: magic number, protocol, system, object.
_LEGACY_PICKLES = 4


def check_torch_file(path: Path) -> None:
    """Refuse a file whose sizes are not those of its contents. Nothing of it runs.

    Raises:
        InputError: a zip bomb, a storage larger than its record, or a tensor that reaches out of its storage.
        Exception: whatever the readers of archives and pickles raise on what is none. Torch must not open that either:
            it might understand what they do not.
    """
    if is_zip(path):
        with path.open("rb") as stream:
            _check_archive(path, stream, path.stat().st_size)
        return
    with path.open("rb") as stream:
        contents = contents_of(stream, _LEGACY_PICKLES)
    _check_contents(path, contents)
    taken = sum(s.elements * s.itemsize for s in contents.storages.values())
    if taken > path.stat().st_size:
        raise InputError(f"{path} has {path.stat().st_size} bytes, its storages claim {taken}: damaged or forged")


def check_torch_bytes(path: Path, data: bytes) -> None:
    """As `check_torch_file`, for a torch file inside of the archive `path`.

    Raises:
        InputError: as there, or not an archive.
    """
    try:
        _check_archive(path, io.BytesIO(data), len(data))
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{path}: a torch file in it is damaged ({type(error).__name__}: {error})") from None


def _check_archive(path: Path, stream: IO[bytes], size: int) -> None:
    entries = {entry.filename: entry for entry in check_zip(path, stream, size)}
    stream.seek(0)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if not pickles:
        raise ValueError("an archive without an entry 'data.pkl'")
    if len(pickles) > 1:
        raise InputError(f"{path} holds {len(pickles)} pickles; a torch file has one")
    with zipfile.ZipFile(stream) as archive, archive.open(pickles[0]) as file:
        contents = contents_of(file)
    _check_contents(path, contents)
    root = pickles[0].removesuffix("data.pkl")
    for storage in contents.storages.values():
        entry = entries.get(f"{root}data/{storage.key}")
        if entry is None or entry.file_size < storage.elements * storage.itemsize:
            raise InputError(
                f"{path}: storage {storage.key[:40]!r} of {storage.elements} elements is "
                f"{'missing' if entry is None else f'{entry.file_size} bytes in the file'}: damaged or forged"
            )


def _check_contents(path: Path, contents: Contents) -> None:
    if contents.foreign:
        raise InputError(f"{path} holds {contents.foreign[0]}; expected plain tensors")
    for view in contents.views:
        elements = math.prod(view.shape)
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        if elements and last >= view.storage.elements:
            raise InputError(f"{path}: a tensor {list(view.shape)} reaches out of its storage: damaged or forged")
        if elements > max(view.storage.elements, _EXPANDED):
            raise InputError(f"{path}: a tensor {list(view.shape)} on {view.storage.elements} stored elements")
