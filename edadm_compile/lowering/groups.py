"""Groups of graph nodes that become one launch; they grow while the graph is walked and are emitted when needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.launch import Operand

#: Activations a kernel applies before it stores, by operator: code in the kernels' ACT constant.
ACTIVATIONS = {"aten.silu.default": 1, "aten.gelu.default": 2, "aten.relu.default": 4}
GELU_TANH = 3
QUANTIZE = "edadm.quantize.default"


def activation_code(node: fx.Node) -> int:
    """ACT code of an activation node, 0 if it is none."""
    if node.op != "call_function":
        return 0
    name = op_name(node.target)
    if name == "aten.gelu.default" and "tanh" in (*node.args[1:], *node.kwargs.values()):
        return GELU_TANH
    return ACTIVATIONS.get(name, 0)


def is_byte_quantize(node: fx.Node) -> bool:
    """Whether a node writes int8 codes."""
    return node.op == "call_function" and op_name(node.target) == QUANTIZE and int(node.args[3]) <= 8  # type: ignore[arg-type]


class Deferred:
    """A value that is not in memory: its consumer reads the parts instead, or asks for it to be written."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


class Codes16:
    """16-bit codes as two int8 planes."""

    def __init__(self, hi: Operand, lo: Operand) -> None:
        self.hi, self.lo = hi, lo


@dataclass
class Group:
    """Nodes that become one launch.

    Attributes:
        tail: the node whose value the group computes so far.
        out: where that value will lie; an arena buffer nobody else writes.
        base: `out` as the launch writes it, before any view.
    """

    tail: fx.Node
    out: Operand
    base: Operand
    act: int = 0
    names: list[str] = field(default_factory=list)

    @property
    def viewed(self) -> bool:
        """Whether the value is a rearranged view of what the launch writes (sizes alone do not tell)."""
        return (self.out.shape, self.out.strides) != (self.base.shape, self.base.strides)


@dataclass
class MatmulGroup(Group):
    """Convolutions or linears on one output, and what follows them element by element.

    Attributes:
        anchors: one node, two that are added (two sources), or several merged side by side.
        merged: the anchors are side by side; nothing else is fused then.
        row: added per image and channel.
        residual: added per element, seen like `base`.
        glu: the second half of the channels gates the first.
    """

    anchors: list[fx.Node] = field(default_factory=list)
    merged: bool = False
    row: Operand | None = None
    rows_per_image: int = 1
    residual: Operand | None = None
    glu: bool = False

    @property
    def bare(self) -> bool:
        """Nothing has been fused yet."""
        return self.row is None and self.residual is None and self.act == 0 and not self.glu and not self.merged


@dataclass
class NormGroup(Group):
    """A group norm or layer norm and the activation after it.

    Attributes:
        node: the norm.
        sources: what it reads: one value, or the parts of a concatenation.
    """

    node: Any = None
    sources: list[Any] = field(default_factory=list)


@dataclass
class ElementGroup(Group):
    """An activation alone, waiting for the quantizer that may follow."""

    source: Any = None
