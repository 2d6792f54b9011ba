"""Places to write to, refused before hours of work and not after."""

from __future__ import annotations

import os
from pathlib import Path

from edadm_compile.errors import ArtifactError


def check_writable(output: Path) -> None:
    """Refuse a file that could not be written at the end.

    Raises:
        ArtifactError: its folder does not exist, may not be written to, or it is a folder itself.
    """
    folder = output.parent
    if not folder.is_dir():
        raise ArtifactError(f"cannot write {output}: folder {folder} does not exist")
    if output.is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"cannot write {output}: {'it is a folder' if output.is_dir() else 'permission denied'}")
