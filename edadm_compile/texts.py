"""Small text files of unknown origin: settings, configurations, indices."""

from __future__ import annotations

from pathlib import Path

#: Bytes; the configurations and indices of the largest published models have a hundredth of it.
LARGEST_TEXT = 16 << 20


def read_text(path: Path) -> str:
    """The text of a regular file.

    Raises:
        OSError: unreadable, a device or a pipe (which may never end), or larger than `LARGEST_TEXT`.
        ValueError: not UTF-8.
    """
    if path.exists() and not path.is_file():
        raise OSError(22, "not a regular file")
    if path.stat().st_size > LARGEST_TEXT:
        raise OSError(27, f"{path.stat().st_size} bytes, allowed {LARGEST_TEXT}")
    return path.read_text(encoding="utf-8")
