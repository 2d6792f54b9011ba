"""What ONNX Runtime made of a graph, read from the optimized graph that it writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx

#: Operators of the optimized graph that multiply integers.
INTEGER_OPS = frozenset(("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm"))


@dataclass(frozen=True)
class OptimizedGraph:
    """An optimized graph in numbers.

    Attributes:
        operators: operator by node name.
        counts: nodes by operator.
        slow: integer convolutions whose types have no fast kernel on x86 (anything but uint8 times int8).
    """

    operators: dict[str, str]
    counts: dict[str, int]
    slow: tuple[str, ...]


def read_optimized(path: Path) -> OptimizedGraph:
    """Read a graph that ONNX Runtime wrote (``optimized_model_filepath``)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    types = {t.name: t.data_type for t in graph.initializer}
    wanted = {2: onnx.TensorProto.UINT8, 3: onnx.TensorProto.INT8}  # zero point of x, weight
    slow = [
        node.name
        for node in graph.node
        if node.op_type == "QLinearConv" and any(types.get(node.input[i]) not in (None, t) for i, t in wanted.items())
    ]
    return OptimizedGraph(
        {n.name: n.op_type for n in graph.node}, dict(Counter(n.op_type for n in graph.node)), tuple(slow)
    )
