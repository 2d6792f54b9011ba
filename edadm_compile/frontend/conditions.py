"""Condition tensors from files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from edadm_compile.errors import InputError


def read_conditions(path: Path | None, option: str = "--cond") -> dict[str, Tensor]:
    """Condition tensors [N, ...] by name from a safetensors file; none without a file.

    Args:
        option: where the path was given, for messages.

    Raises:
        InputError: unreadable, or a tensor without rows.
    """
    if path is None:
        return {}
    from safetensors.torch import load_file

    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path}: not a readable safetensors file: it is no regular file")
    try:
        tensors = load_file(path)
    except Exception as error:
        raise InputError(f"{option} {path}: not a readable safetensors file: {error}") from None
    empty = [name for name, value in tensors.items() if value.dim() == 0 or value.shape[0] == 0]
    if empty:
        raise InputError(f"{option} {path}: tensor {empty[0]!r} has no rows; expected [N, ...]")
    return dict(tensors)
