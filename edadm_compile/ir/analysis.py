"""Dataflow facts about a graph: what each node depends on, its shapes, where it comes from in the source model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import Program, get_constant

#: Dependency that stands for "only the batch size".
BATCH = "<batch>"


def dependencies(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """For each node the names of the graph inputs whose *values* reach it; shapes alone count as `BATCH`."""
    deps: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            deps[node] = frozenset({str(node.target)})
        elif node.op == "call_function" and op_name(node.target) == "aten.sym_size.int":
            deps[node] = frozenset({BATCH})
        else:
            deps[node] = frozenset().union(*(deps[arg] for arg in node.all_input_nodes))
    return deps


def last_read(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each of `nodes`, in order, what it reads as the last of them: none behind it needs those values."""
    readers = {source: node for node in nodes for source in node.all_input_nodes}
    found: dict[fx.Node, list[fx.Node]] = {}
    for source, reader in readers.items():
        found.setdefault(reader, []).append(source)
    return found


def constant_target(node: Any) -> str | None:
    """Name of the constant a node reads, or None."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def is_layer(node: fx.Node) -> bool:
    """Whether `node` is a convolution or linear whose weight is a constant (possibly through its quantizer)."""
    if node.op != "call_function" or op_name(node.target) not in LAYER_OPS:
        return False
    return weight_node(node) is not None


def weight_node(node: fx.Node) -> fx.Node | None:
    """The get_attr node of a layer's weight, seen through a weight quantizer; None when it is computed."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    while isinstance(weight, fx.Node) and weight.op == "call_module" and len(weight.args) == 1:
        weight = weight.args[0]
    return weight if constant_target(weight) else None  # type: ignore[return-value]


def layer_weight(program: Program, node: fx.Node) -> torch.Tensor:
    """The float weight of a layer node."""
    weight = weight_node(node)
    assert weight is not None
    return get_constant(program.graph_module, str(weight.target))


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape recorded by `propagate_shapes` (batch size 2, or the fixed one); () for non-tensors."""
    shape: tuple[int, ...] = node.meta.get("shape", ())
    return shape


def is_batched(node: fx.Node) -> bool:
    """Whether dimension 0 is exactly the batch, found by propagating two batch sizes."""
    return bool(node.meta.get("batched", False))


def scope_of(node: fx.Node) -> tuple[str, ...]:
    """Module paths of the source model around `node`, outermost first."""
    scope: tuple[str, ...] = node.meta.get("scope", ())
    return scope


def propagate_shapes(program: Program) -> None:
    """Record ``shape``, ``dtype`` and ``batched`` of every node, without computing anything (fake tensors)."""
    lowest = program.signature.min_batch
    sizes = (lowest, lowest) if lowest == program.signature.max_batch else (2, 3)
    runs = [fake_values(program, size) for size in sizes]
    for node in program.graph_module.graph.nodes:
        first, second = runs[0].get(node), runs[1].get(node)
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
            for key in ("shape", "dtype"):
                node.meta.pop(key, None)
            node.meta["batched"] = False
            continue
        node.meta["shape"], node.meta["dtype"] = tuple(first.shape), first.dtype
        heads = (first.shape[:1], second.shape[:1])
        node.meta["batched"] = heads == ((sizes[0],), (sizes[1],)) and first.shape[1:] == second.shape[1:]


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False


@contextmanager
def shapes_only(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """New tensors have no memory, operators compute shapes and types.

    Where shapes do not fit, operators raise; torch would log a traceback beside it, which is not for users.

    Args:
        mode: of tensors without memory that are there already; None: there are none.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            yield
    finally:
        logger.setLevel(level)


def fake_mode_of(program: Program) -> FakeTensorMode | None:
    """The mode of the constants of a program without values (`edadm_compile.ir.valueless`), else None."""
    for value in program.graph_module.buffers():
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def fake_values(program: Program, batch: int) -> dict[fx.Node, Any]:
    """Value of every node at a batch size: fake tensors (shapes and types only), and plain values such as sizes."""
    with shapes_only(fake_mode_of(program)):
        values = [torch.empty((batch, *spec.shape), dtype=spec.dtype) for spec in program.signature.inputs]
        if program.time is not None:
            names = [n.target for n in program.graph_module.graph.nodes if n.op == "placeholder"]
            tables = program.time.tables
            values += [torch.empty((batch, *tables[str(n)].shape[1:])) for n in names[len(values):]]  # fmt: skip
        recorder = _Recorder(program.graph_module)
        recorder.run(*values)
    return dict(recorder.env)


def factor_after(node: fx.Node) -> tuple[float, fx.Node | None]:
    """The number that the only reader of a node multiplies it with, and that reader; (1, None) if it does not."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    if user is None or user.op != "call_function" or op_name(user.target) not in ("aten.mul.Tensor", "aten.mul.Scalar"):
        return 1.0, None
    if user.args[0] is not node or not isinstance(user.args[1], (int, float)):
        return 1.0, None
    return float(user.args[1]), user


def topological(nodes: Iterable[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """`nodes` in graph order."""
    wanted = set(nodes)
    return [node for node in graph.nodes if node in wanted]


def x_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on the noisy sample (the first graph input)."""
    deps = dependencies(graph)
    first = next(str(n.target) for n in graph.nodes if n.op == "placeholder")
    return {node for node, names in deps.items() if first in names}
