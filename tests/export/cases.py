"""What one test of an operator consists of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.export.onnx_graphs import Graph


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        name: operator, without ``aten.``.
        words: what is special here.
        ulps: allowed distance, in units of 2^-23 of the result's element or of `largest`.
        largest: magnitude that intermediate values reach, where that is more than the result.
        items: items of a list to compare, all by default.
        shape_only: the values are undefined.
    """

    name: str
    words: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    ulps: float = 4
    largest: float = 0
    items: tuple[int, ...] | None = None
    shape_only: bool = False

    @property
    def label(self) -> str:
        """Operator and words, for the report."""
        return f"{self.name}: {self.words}"

    def graph(self) -> Graph:
        """The call as a graph."""
        return Graph(f"aten.{self.name}", self.args, self.kwargs, self.items)


def case(
    name: str, words: str, *args: Any, ulps: float = 4, largest: float = 0, items: tuple[int, ...] | None = None,
    shape_only: bool = False, **kwargs: Any,
) -> Case:  # fmt: skip
    """A `Case` with the operator's arguments written out."""
    return Case(name, words, args, kwargs, ulps, largest, items, shape_only)
