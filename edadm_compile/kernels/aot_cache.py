"""Compiled kernels kept on disk, by key, for later compilations."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels.cubin import Cubin


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/edadm-compile/cubins``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "edadm-compile" / "cubins"


class Cache:
    """A folder of ``<key>.cubin`` and ``<key>.json``; any number of processes may use it at once.

    Args:
        folder: made when the first kernel is written. A folder that cannot be written is not an error: kernels are
            then compiled each time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> Cubin | None:
        """The kernel, or None where it is missing or damaged."""
        try:
            record = json.loads((self._folder / f"{key}.json").read_text())
            data = (self._folder / f"{key}.cubin").read_bytes()
            if hashlib.sha256(data).hexdigest() != record.pop("sha256"):
                return None
            return Cubin.from_json(record, data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArtifactError):
            return None

    def put(self, key: str, cubin: Cubin) -> None:
        """Store a kernel: the bytes first, then the record that vouches for them."""
        record = {**cubin.to_json(), "sha256": hashlib.sha256(cubin.data).hexdigest()}
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(f"{key}.cubin", cubin.data)
            self._write(f"{key}.json", json.dumps(record, sort_keys=True).encode())

    def _write(self, name: str, data: bytes) -> None:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.replace(temporary, self._folder / name)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
