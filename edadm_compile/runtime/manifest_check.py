"""Types of the manifest's entries that say where a file comes from: reports print them, no program needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edadm_compile.errors import ArtifactError

Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096


def _integer(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _any(value: Any) -> bool:
    return True


def _or_null(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(test(item) for item in value)


def _map(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _table(required: dict[str, Test], optional: dict[str, Test] | None = None) -> Test:
    """A table that has the required keys; optional ones are checked where they are there, others are let through."""

    def test(value: Any) -> bool:
        if not isinstance(value, dict) or not set(required) <= set(value):
            return False
        return all(check(value[key]) for key, check in {**required, **(optional or {})}.items() if key in value)

    return test


_CONFIG = _table(
    {
        "method": _text,
        "weight_bits": _integer,
        "act_bits": _integer,
        "seed": _integer,
        "attention": lambda v: v in ("float", "int8"),
    },
    {"deploy": lambda v: v in (None, "onnxruntime")},
)
_SOURCE = _table(
    {"class": _text, "parameters": _integer}, {"file": _text, "sha256": _text, "config": lambda v: isinstance(v, dict)}
)
_QUALITY = _table(
    {"sqnr": _or_null(_number)},
    {
        "sqnr_without_last": _or_null(_number),
        "per_step": _list(_or_null(_number)),
        "branches": lambda v: _list(_or_null(_number))(v) and len(v) == 2,
    },
)


def _errors(value: Any) -> bool:
    """Errors of a layer: of its widths, one where they are fixed, else two."""
    counted = _map(_number)(value["errors"])
    return counted and len(value["errors"]) >= (1 if value["fixed"] else 2)


def _mixed_layer(value: Any) -> bool:
    known: dict[str, Test] = {"layer": _text, "parameters": _integer, "widths": _text, "fixed": _any, "errors": _any}
    return _table(known)(value) and _errors(value)


_MIXED = _table(
    {
        "budget_bits": _or_null(_number),
        "min_sqnr": _or_null(_number),
        "measured": lambda v: type(v) is bool,
        "stored_bits": _number,
        "predicted_sqnr": _or_null(_number),
        "layers": _list(_mixed_layer),
        "curve": _list(_table({"bits": _number, "predicted_sqnr": _or_null(_number)})),
    }
)
_ENTRIES: dict[str, Test] = {
    "config": _CONFIG,
    "source": _SOURCE,
    "quality": _or_null(_QUALITY),
    "allocation": _or_null(_list(_integer)),
    "average_bits": _number,
    "mixed_precision": _or_null(_MIXED),
    "units": _list(lambda v: isinstance(v, dict)),
    "versions": _map(_text),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Refuse entries of a type that this package does not write; entries it does not know are let through.

    Raises:
        ArtifactError: naming the entry.
    """
    for name, test in _ENTRIES.items():
        if name in manifest and not test(manifest[name]):
            raise ArtifactError(f"manifest: entry {name!r} is not understood: {str(manifest[name])[:80]!r}")
    if not _list(_text)(manifest.get("notes")):
        raise ArtifactError("manifest: entry 'notes' is no list of texts")
