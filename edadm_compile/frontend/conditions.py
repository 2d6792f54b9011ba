"""Condition tensors from files and prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from edadm_compile.errors import InputError
from edadm_compile.frontend.prompts import Encoded, encode, read_prompts


def read_conditions(path: Path | None, option: str = "--cond") -> dict[str, Tensor]:
    """Condition tensors [N, ...] by name from a safetensors file; none without a file.

    Args:
        option: where the path was given, for messages.

    Raises:
        InputError: unreadable, a tensor without rows, or one with values that are not finite.
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
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise InputError(f"{option} {path}: tensor {broken[0]!r} holds NaN or infinite values; expected finite ones")
    return dict(tensors)


def gather(tensors: Path | None, prompts: Path | None, folder: Path | None, size: tuple[int, int] | None) -> Encoded:
    """Condition tensors of ``--cond`` and ``--prompts`` together.

    Args:
        folder: diffusers pipeline folder with the text encoders.
        size: height and width of the noisy sample, None if unknown.

    Raises:
        InputError: files that cannot be used, or a condition that both give.
    """
    given = read_conditions(tensors)
    if prompts is None:
        return Encoded(given)
    encoded = encode(folder, read_prompts(prompts), size)
    twice = sorted(set(given) & set(encoded.conditions))
    if twice:
        raise InputError(f"--cond {tensors} and --prompts {prompts} both give {twice[0]!r}; leave it out of the file")
    return Encoded({**encoded.conditions, **given}, encoded.null)


def sample_size(config: Mapping[str, Any], shape: tuple[int, int, int] | None) -> tuple[int, int] | None:
    """Height and width of the noisy sample, from ``--shape`` or a diffusers configuration; None if neither says."""
    if shape is not None:
        return shape[1:]
    size = config.get("sample_size")
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return (size, size) if isinstance(size, int) else None
