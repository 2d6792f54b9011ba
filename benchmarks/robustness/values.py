"""Wrong values: what a hostile or broken writer may put where a reader expects something else."""

from __future__ import annotations

import random
from typing import Any

_NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 255, 256, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 40, (1 << 62), (1 << 63) - 1,
    1 << 63, 10**30, -(10**18),
)  # fmt: skip
_FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-45, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "", "x", "%0", "%3", "%999999", "%-1", "%x", "a" * 5000, "\x1b]0;title\x07", "[/red]", "../../etc/passwd", "float32",
    "aten.add.Tensor", "operator.mul", "\ud800", "__class__", "t); import os; (", "\u202e", "sm_80", "1",
)  # fmt: skip


def wrong(rng: random.Random, value: Any = None) -> Any:
    """A value in place of `value`: often near it, sometimes of another type, sometimes absurd."""
    kind = rng.randrange(10)
    if kind < 5 and isinstance(value, bool):
        return not value
    if kind < 6 and isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, value * 2, value // 2, -value, value * 1000, value + 16, rng.choice(_NUMBERS))
        )
    if kind < 6 and isinstance(value, float):
        return rng.choice((-value, value * 2, value * 1e30, rng.choice(_FLOATS)))
    if kind < 5 and isinstance(value, str):
        return rng.choice((value + "x", value[:-1], rng.choice(_TEXTS)))
    if kind < 7 and isinstance(value, list) and value:
        return _list(rng, value)
    if kind < 7 and isinstance(value, dict) and value:
        return _dict(rng, value)
    return rng.choice(
        (
            None,
            True,
            rng.choice(_NUMBERS),
            rng.choice(_FLOATS),
            rng.choice(_TEXTS),
            [],
            {},
            [value],
            [rng.choice(_NUMBERS)] * 4,
            {"a": 1},
        )
    )


def _list(rng: random.Random, value: list[Any]) -> list[Any]:
    changed, at = list(value), rng.randrange(len(value))
    kind = rng.randrange(6)
    if kind == 0:
        del changed[at]
    elif kind == 1:
        changed.insert(at, changed[at])
    elif kind == 2:
        changed += changed[: 1 + at]
    elif kind == 3:
        other = rng.randrange(len(value))
        changed[at], changed[other] = changed[other], changed[at]
    else:
        changed[at] = wrong(rng, changed[at])
    return changed


def _dict(rng: random.Random, value: dict[str, Any]) -> dict[str, Any]:
    changed, key = dict(value), rng.choice(list(value))
    kind = rng.randrange(5)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[rng.choice(_TEXTS)] = changed[key]
    elif kind == 2:
        changed[key] = changed[rng.choice(list(changed))]
    else:
        changed[key] = wrong(rng, changed[key])
    return changed


def paths(value: Any, most: int = 20_000) -> list[tuple[Any, ...]]:
    """Where the items of nested lists and tables are."""
    found: list[tuple[Any, ...]] = []
    stack: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while stack and len(found) < most:
        path, item = stack.pop()
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, inner in pairs:
            found.append((*path, key))
            stack.append(((*path, key), inner))
    return found


def change(rng: random.Random, root: Any, path: tuple[Any, ...]) -> None:
    """Replace, or sometimes remove, what is at `path`, in place; nothing where there is no such place."""
    if not path:
        return
    target = root
    for key in path[:-1]:
        target = target[key]
    if rng.random() < 0.1:
        del target[path[-1]]
    else:
        target[path[-1]] = wrong(rng, target[path[-1]])
