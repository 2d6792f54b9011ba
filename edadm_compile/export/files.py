"""ONNX models as files: checked, written whole or not at all, weights beside the graph where it would pass 2 GB."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from edadm_compile.errors import ExportError

#: protobuf's limit is 2 GiB; graphs near it keep their weights in a file of their own.
INLINE_LIMIT = 1_900_000_000


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all constants."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def needs_external_data(model: ir.Model) -> bool:
    """Whether the model is too large for one protobuf message."""
    return weight_bytes(model) > INLINE_LIMIT


def save(model: ir.Model, path: Path, *, external: bool | None = None) -> list[Path]:
    """Check a model and write it atomically.

    Args:
        external: keep the weights in ``NAME.data`` beside the graph; by default only where they pass `INLINE_LIMIT`.

    Returns:
        the files written; older ones of these names are replaced together, after everything has been written.

    Raises:
        ExportError: the folder cannot be written, or the model is not valid ONNX (a bug of the exporter).
    """
    apart = needs_external_data(model) if external is None else external
    data = f"{path.name}.data" if apart else None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            ir.save(model, draft, external_data=data)
            _check(draft)
            return _move(Path(folder), ([data] if data else []) + [path.name], path.parent)  # the graph last
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None


def _move(folder: Path, names: Sequence[str], to: Path) -> list[Path]:
    """Put files in place, all or none: an older graph with newer data would compute anything.

    Raises:
        OSError: one could not be put in place; the others are as they were.
    """
    done: list[Path] = []
    try:
        for name in names:
            if (to / name).is_file():
                _keep(to / name, folder / f"{name}.older")
            (folder / name).replace(to / name)
            done.append(to / name)
    except BaseException:
        for path in done:
            older = folder / f"{path.name}.older"
            if older.exists():
                older.replace(path)
            else:
                path.unlink()
        raise
    return done


def _keep(path: Path, copy: Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX, which is a bug of the exporter: {str(error)[:400]}") from error


def check_writable(path: Path) -> None:
    """Refuse an output path that cannot be written, before any work.

    Raises:
        ExportError: it is a folder, or its folder does not exist or cannot be written.
    """
    if path.is_dir():
        raise ExportError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ExportError(f"cannot write {path}: folder {path.parent} does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from None
