"""Zip archives of unknown origin: sizes and names, before anything is inflated or opened by a library.

``.pt``, ``.pt2`` and ``.npz`` files are zip archives. torch writes entries as they are, numpy may deflate them: a few
kilobytes can announce terabytes of zeros, and entries that lie on top of each other announce the same bytes many times.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

from edadm_compile.errors import InputError

_MOST_ENTRIES = 200_000
#: What all entries may unpack to: this many times the file, and this many bytes more.
_FACTOR, _SPARE = 20, 64 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive; `zipfile.is_zipfile` raises for some that are damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def check_zip(path: Path, stream: IO[bytes] | None = None, size: int | None = None) -> list[zipfile.ZipInfo]:
    """The entries of an archive.

    Args:
        path: named in messages; opened where there is no stream.
        stream, size: an archive inside of another one, and its bytes.

    Raises:
        InputError: entries that unpack to far more than the file, share bytes, have the same name, lead out of the
            archive, or are encrypted or packed in a way that no supported writer uses.
        zipfile.BadZipFile: not an archive.
    """
    held = path.stat().st_size if size is None else size
    with zipfile.ZipFile(path if stream is None else stream) as archive:
        entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise InputError(f"{path} holds {len(entries)} entries, allowed {_MOST_ENTRIES}")
    unpacked, packed = sum(e.file_size for e in entries), sum(e.compress_size for e in entries)
    if unpacked > _FACTOR * held + _SPARE:
        raise InputError(f"{path} has {held} bytes and would unpack to {unpacked}: refused as a zip bomb")
    if packed > held:
        raise InputError(f"{path} has {held} bytes, its entries claim {packed}: they lie on top of each other")
    if len({e.filename for e in entries}) != len(entries):  # two readers may choose different ones
        raise InputError(f"{path} holds two entries of one name")
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
            raise InputError(f"{path}: entry {name[:80]!r} leads out of the archive")
        if entry.flag_bits & 1 or entry.compress_type not in _METHODS:
            raise InputError(f"{path}: entry {name[:80]!r} is encrypted, or packed by method {entry.compress_type}")
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise InputError(f"{path}: entry {name[:80]!r} is not packed and claims another size than it has")
    return entries
