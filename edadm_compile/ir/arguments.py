"""Arguments of operator nodes, however they were given."""

from __future__ import annotations

from typing import Any

from torch import fx


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An operator argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def pair(value: Any) -> list[int]:
    """An int or a 1- or 2-list as a list of two."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
