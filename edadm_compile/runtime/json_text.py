"""JSON of unknown origin: bounded before it is parsed, without duplicate keys, without NaN."""

from __future__ import annotations

import json
import re
from typing import Any

from edadm_compile.errors import ArtifactError
from edadm_compile.runtime.limits import Limits

#: Escapes of control characters but newline and tabulator, and bare ones: texts of a file reach terminals.
_CONTROL = re.compile(
    r"(?<!\\)(?:\\\\)*\\(?:u00(?:0[0-8bcef]|1[0-9a-f]|7f|[89][0-9a-f])|[bfr])|[\x7f-\x9f]", re.IGNORECASE
)


def parse(text: str, what: str, limits: Limits) -> Any:
    """The value of a JSON text.

    Args:
        what: named in messages.

    Raises:
        ArtifactError: not JSON, a key twice in one table, NaN, infinity, a control character, or beyond `limits`.
    """
    count = text.count(",") + text.count("[") + text.count("{")  # an upper bound of the values in it
    if count > limits.values:
        raise ArtifactError(f"{what}: more than {limits.values} values")
    if _CONTROL.search(text):
        raise ArtifactError(f"{what}: a text with control characters")
    try:
        value = json.loads(text, object_pairs_hook=_table, parse_constant=_refused, parse_int=_integer)
    except RecursionError:
        raise ArtifactError(f"{what}: nested deeper than {limits.depth} levels") from None
    except ValueError as error:
        raise ArtifactError(f"{what}: malformed JSON: {str(error)[:200]}") from None
    _check_depth(value, what, limits)
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key appears twice: {_twice([key for key, _ in pairs])!r}")
    return found


def _twice(keys: list[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))[:80]  # type: ignore[func-returns-value]


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _check_depth(value: Any, what: str, limits: Limits) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > limits.depth:
            raise ArtifactError(f"{what}: nested deeper than {limits.depth} levels")
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, (dict, list))
        ]
