"""What ONNX Runtime made of a graph, read from the optimized graph that it writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

#: Operators of the optimized graph that multiply integers.
INTEGER_OPS = frozenset(("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm"))

#: Where an integer operator has the zero points of its left and right operands, which have their types.
_ZERO_POINTS = {"QLinearConv": (2, 5), "QLinearMatMul": (2, 5), "QGemm": (2, 5), "MatMulIntegerToFloat": (4, 5)}


@dataclass(frozen=True)
class OptimizedGraph:
    """An optimized graph in numbers.

    Attributes:
        operators: operator by node name.
        counts: nodes by operator.
        slow: integer layers whose types have no fast kernel on x86 (anything but uint8 times int8).
    """

    operators: dict[str, str]
    counts: dict[str, int]
    slow: tuple[str, ...]


def read_optimized(path: Path) -> OptimizedGraph:
    """Read a graph that ONNX Runtime wrote (``optimized_model_filepath``)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {t.name: t.data_type for t in graph.initializer}
    slow = [node.name for node in graph.node if not _is_fast(node, types)]
    return OptimizedGraph(
        {n.name: n.op_type for n in graph.node}, dict(Counter(n.op_type for n in graph.node)), tuple(slow)
    )


def _is_fast(node: onnx.NodeProto, types: dict[str, int]) -> bool:
    """Whether an operator is no integer layer, or multiplies uint8 by int8; an operand without zero point is unknown."""
    wanted = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    places = _ZERO_POINTS.get(node.op_type, ())
    names = [node.input[i] if i < len(node.input) else "" for i in places]
    return all(types.get(name, kind) == kind for name, kind in zip(names, wanted, strict=False))
