"""Configurations of unknown origin: built without memory first, and compared with the weights that are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from edadm_compile.errors import InputError

#: Bounds of a UNet's configuration; the largest published one has numbers below 3000 and lists of 4.
_LARGEST_NUMBER, _LONGEST_LIST, _LONGEST_TEXT, _DEEPEST, _MOST_VALUES = 1 << 20, 64, 4096, 6, 2000
#: Numbers that say how many modules there are (a loop each, and products of them), and the most that one may be.
_REPEATS = ("layers", "blocks", "num_attention_heads")
_MOST_REPEATS = 64


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that would take forever to build.

    Raises:
        InputError: naming the entry.
    """
    left = [_MOST_VALUES]
    for name, value in config.items():
        _check(str(name), value, where, left, 0)


def _check(name: str, value: Any, where: str, left: list[int], depth: int) -> None:
    left[0] -= 1
    if left[0] < 0 or depth > _DEEPEST:
        raise InputError(f"{where}: the configuration has too many values, or is nested too deeply")
    if isinstance(value, (list, tuple, dict)):
        if len(value) > _LONGEST_LIST:
            raise InputError(f"{where}: {name[:80]} has {len(value)} entries, allowed {_LONGEST_LIST}")
        for item in value.values() if isinstance(value, dict) else value:
            _check(name, item, where, left, depth + 1)
    elif isinstance(value, (int, float)):
        most = (
            _MOST_REPEATS if any(name.startswith(word) or f"_{word}" in name for word in _REPEATS) else _LARGEST_NUMBER
        )
        if not abs(value) <= most:
            raise InputError(f"{where}: {name[:80]} is {str(value)[:40]}, allowed up to {most}")
    elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
        raise InputError(f"{where}: {name[:80]} is a text of {len(value)} characters, allowed {_LONGEST_TEXT}")


def check_fits(
    build: Callable[[], nn.Module], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Refuse weights that do not fit a model, before the model takes memory.

    Args:
        build: makes the model from `config`.
        shapes: of the weights by name.

    Raises:
        InputError: a configuration that the class refuses, or a weight that is missing, foreign or of another shape.
    """
    check_config(config, where)
    with torch.device("meta"):
        wanted = {n: tuple(v.shape) for n, v in build().state_dict().items()}
    missing, foreign = [n for n in wanted if n not in shapes], [n for n in shapes if n not in wanted]
    if missing or foreign:
        kind, name = ("Missing", missing[0]) if missing else ("Unexpected", foreign[0])
        raise InputError(f"{where}: weights do not fit the model: {kind} key {name[:200]!r}")
    other = next((n for n in wanted if wanted[n] != tuple(shapes[n])), None)
    if other is not None:
        raise InputError(
            f"{where}: weights do not fit the model: size mismatch for {other}: the file has {list(shapes[other])}, "
            f"the configuration {list(wanted[other])}"
        )
