"""Further shapes in a ``.qmod`` file: programs that differ from the first ones in numbers among their arguments alone.

The manifest's ``shapes`` has one entry for each, with the signature at that shape and the nodes of both programs that
differ, as ``[index, arguments, keyword arguments]``. Operators, constants and layer records are the first programs'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edadm_compile.errors import ArtifactError, InputError
from edadm_compile.ir.program import Program, Signature, text_of
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.signature_json import signature_from_json, signature_to_json

DIALECTS = ("qdq", "lowered")
_ENTRY = {"signature", "programs"}


@dataclass(frozen=True)
class Programs:
    """A file's two programs at one shape, with the constants of those at the first."""

    qdq: Program
    lowered: Program

    @property
    def shape(self) -> tuple[int, ...]:
        """[C, H, W] of x."""
        return self.lowered.signature.inputs[0].shape


def not_compiled(asked: tuple[int, ...], shapes: list[tuple[int, ...]]) -> InputError:
    """The refusal of a shape that a file has no program for."""
    known = [text_of(shape) for shape in shapes]
    again = " ".join(f"--shape {name}" for name in [*known, text_of(asked)])
    return InputError(
        f"shape {text_of(asked)} was not compiled; the file has {'; '.join(known)}: take one of them, or compile again "
        f"with {again}"
    )


def entry_of(
    programs: Programs, first: dict[str, list[Any]], to_json: Callable[[Program], list[Any]]
) -> dict[str, Any]:
    """One entry of the manifest's ``shapes``.

    Args:
        first: nodes of the first shape's programs by dialect.
        to_json: the nodes of a program.
    """
    return {
        "signature": signature_to_json(programs.lowered.signature),
        "programs": {p.dialect: _changes(first[p.dialect], to_json(p)) for p in (programs.qdq, programs.lowered)},
    }


def _changes(first: list[Any], nodes: list[Any]) -> list[Any]:
    assert len(first) == len(nodes), "the programs of two shapes have the same nodes"
    changes = []
    for index, (a, b) in enumerate(zip(first, nodes, strict=True)):
        assert a[:2] == b[:2] and len(a) == len(b) and a[4:] == b[4:], (
            "the programs of two shapes differ in numbers only"
        )
        if a != b:
            changes.append([index, *b[2:4]])
    return changes


def entries_of(value: Any, first: Signature, limits: Limits) -> list[tuple[Signature, dict[str, Any]]]:
    """Signature and changes of every further shape that a manifest names.

    Raises:
        ArtifactError: too many, malformed, or not the first shape's inputs at another height and width.
    """
    if not isinstance(value, list) or len(value) > limits.shapes:
        raise ArtifactError(f"shapes: expected a list of at most {limits.shapes} entries")
    found: list[tuple[Signature, dict[str, Any]]] = []
    seen = {first.inputs[0].shape}
    for number, entry in enumerate(value):
        if not isinstance(entry, dict) or set(entry) != _ENTRY or not isinstance(entry["programs"], dict):
            raise ArtifactError(f"shapes: entry {number} is malformed")
        if set(entry["programs"]) != set(DIALECTS):
            raise ArtifactError(f"shapes: entry {number} has not the programs {' and '.join(DIALECTS)}")
        signature = signature_from_json(entry["signature"])
        x = signature.inputs[0].shape
        if x in seen:
            raise ArtifactError(f"shapes: entry {number} repeats the shape {text_of(x)}")
        if len(x) != len(first.inputs[0].shape) or x[0] != first.inputs[0].shape[0] or not _fits(signature, first):
            raise ArtifactError(f"shapes: entry {number} has other inputs than the first shape")
        seen.add(x)
        found.append((signature, entry["programs"]))
    return found


def _fits(signature: Signature, first: Signature) -> bool:
    """Whether everything but height, width, batch limits and the source's name is the first signature's."""
    x = replace(signature.inputs[0], shape=first.inputs[0].shape)
    return (x, *signature.inputs[1:]) == first.inputs and signature.output == first.output


def changed(nodes: Any, changes: Any, number: int, dialect: str) -> list[Any]:
    """The nodes of a further shape's program.

    Args:
        nodes: of the first shape's program, which has been read.
        changes: from `entry_of`.
        number: of the entry, for messages.

    Raises:
        ArtifactError: anything that `entry_of` would not have written.
    """
    where = f"shapes: entry {number}, {dialect} program"
    if not isinstance(changes, list) or len(changes) > len(nodes):
        raise ArtifactError(f"{where}: expected a list of changed nodes")
    result, last = list(nodes), -1
    for change in changes:
        if not isinstance(change, list) or not 2 <= len(change) <= 3 or type(change[0]) is not int:
            raise ArtifactError(f"{where}: a changed node is malformed")
        index, *arguments = change
        if not last < index < len(nodes):
            raise ArtifactError(f"{where}: changed node {index} is out of order, or there is none of that number")
        node = nodes[index]
        if len(arguments) != len(node[2:4]) or node[0] != "f":
            raise ArtifactError(f"{where}: node {index} takes no such change")
        if not all(_only_numbers(a, b) for a, b in zip(arguments, node[2:4], strict=True)):
            raise ArtifactError(f"{where}: node {index} differs in more than numbers")
        result[index] = [*node[:2], *arguments, *node[4:]]
        last = index
    return result


def _only_numbers(value: Any, first: Any) -> bool:
    """Whether two arguments differ in numbers alone."""
    if isinstance(first, list) and isinstance(value, list):
        return len(value) == len(first) and all(_only_numbers(a, b) for a, b in zip(value, first, strict=True))
    if isinstance(first, dict) and isinstance(value, dict):
        return set(value) == set(first) and all(_only_numbers(value[k], first[k]) for k in first)
    return (_is_number(value) and _is_number(first)) or (type(value) is type(first) and bool(value == first))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
