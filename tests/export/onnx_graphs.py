"""Small fx graphs with an open batch as ONNX models, and ONNX Runtime to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edadm_compile.export.builder import DTYPES, Builder
from edadm_compile.export.operators import FLOAT_TABLE
from edadm_compile.export.scope import Dim, Emitter, Scope
from edadm_compile.ir.ops import resolve

#: Batch sizes from which the exporter learns what is open.
SIZES = (2, 5)
OPSET, IR_VERSION = 21, 10


class Given:
    """A graph input.

    Args:
        make: (batch, generator) to its value.
        open: whether dimension 0 is the batch.
    """

    def __init__(self, make: Callable[[int, torch.Generator], Tensor], open: bool = True) -> None:
        self.make, self.open = make, open


class Constant:
    """A constant of the graph."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Size:
    """The batch size plus a number, computed in the graph."""

    def __init__(self, plus: int = 0) -> None:
        self.plus = plus


def normal(*shape: int, dtype: torch.dtype = torch.float32, batched: bool = True) -> Given:
    """Normal numbers within [-3, 3], [batch, *shape]."""
    return Given(lambda b, g: torch.randn(_sizes(b, shape, batched), generator=g).clamp(-3, 3).to(dtype), batched)


def between(low: float, high: float, *shape: int, batched: bool = True) -> Given:
    """Uniform numbers."""
    return Given(lambda b, g: low + (high - low) * torch.rand(_sizes(b, shape, batched), generator=g), batched)


def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64, batched: bool = True) -> Given:
    """Whole numbers from `low` to `high` - 1."""
    return Given(lambda b, g: torch.randint(low, high, _sizes(b, shape, batched), generator=g).to(dtype), batched)


def exactly(values: Sequence[Any], dtype: torch.dtype = torch.float32) -> Given:
    """These values for every image."""
    row = torch.tensor(values, dtype=dtype)
    return Given(lambda b, g: row.expand(b, *row.shape).clone())


def _sizes(batch: int, shape: tuple[int, ...], batched: bool) -> tuple[int, ...]:
    return (batch, *shape) if batched else shape


class Graph:
    """One operator call as a graph whose outputs are the result, or those items of a list that are asked for.

    Args:
        args, kwargs: of the operator; `Given`, `Constant` and `Size` among them become nodes.
    """

    def __init__(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], items: Sequence[int] | None = None
    ) -> None:
        self.inputs: list[Given] = []
        root, graph = nn.Module(), fx.Graph()
        nodes: dict[int, fx.Node] = {}
        found = _leaves([*args, *kwargs.values()], Given)
        batched = next((g for g in found if g.open), normal())
        for given in [batched, *found]:
            if id(given) not in nodes:
                nodes[id(given)] = graph.placeholder(f"x{len(self.inputs)}")
                self.inputs.append(given)

        def to_node(arg: Any) -> Any:
            if isinstance(arg, (list, tuple)):
                return [to_node(a) for a in arg]
            if isinstance(arg, Given):
                return nodes[id(arg)]
            if isinstance(arg, Constant):
                label = f"c{len(list(root.buffers()))}"
                root.register_buffer(label, arg.value)
                return graph.get_attr(label)
            if isinstance(arg, Size):
                size = graph.call_function(resolve("aten.sym_size.int"), (nodes[id(batched)], 0))
                return size if arg.plus == 0 else graph.call_function(resolve("operator.add"), (size, arg.plus))
            return arg

        call = graph.call_function(resolve(name), tuple(map(to_node, args)), {k: to_node(v) for k, v in kwargs.items()})
        output = graph.output(call)
        result = fx.GraphModule(root, graph)(*self.values(SIZES[0]))
        if isinstance(result, (list, tuple)):
            graph.erase_node(output)
            wanted = range(len(result)) if items is None else items
            graph.output([graph.call_function(resolve("operator.getitem"), (call, i)) for i in wanted])
        self.module = fx.GraphModule(root, graph)

    def values(self, batch: int) -> list[Tensor]:
        """Inputs for a batch size, the same at every call."""
        return [given.make(batch, torch.Generator().manual_seed(i)) for i, given in enumerate(self.inputs)]

    def reference(self, batch: int) -> list[Tensor]:
        """What torch computes."""
        with torch.no_grad():
            result = self.module(*self.values(batch))
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def model(self) -> onnx.ModelProto:
        """The ONNX model."""
        return to_model(self.module, self.values)


def _leaves(value: Any, kind: type) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in _leaves(v, kind)]
    return [value] if isinstance(value, kind) else []


def to_model(
    module: fx.GraphModule, values: Callable[[int], list[Tensor]], table: dict[str, Emitter] | None = None
) -> onnx.ModelProto:
    """The ONNX model of a graph, its batch open: sizes that `values` changes with the batch.

    Args:
        values: inputs for a batch size; only their shapes and types count.
    """
    runs = tuple(_fake_run(module, values(size)) for size in SIZES)
    builder = Builder()
    scope = Scope(module, builder, FLOAT_TABLE if table is None else table, runs, SIZES)  # type: ignore[arg-type]
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [
        ir.Value(name=n.name, shape=_shape(scope.dims(n)), type=ir.TensorType(DTYPES[scope.dtype(n)]))
        for n in placeholders
    ]
    if inputs:
        scope.batch = builder.op("Shape", inputs[0], start=0, end=1, name="batch")
    results = scope.run(inputs)
    outputs = module.graph.output_node().args[0]
    named = []
    for result, node in zip(results, outputs if isinstance(outputs, (list, tuple)) else [outputs], strict=True):
        value = builder.op("Identity", result, name="result")
        value.type, value.shape = ir.TensorType(DTYPES[scope.dtype(node)]), _shape(scope.dims(node))
        named.append(value)
    graph = ir.Graph(
        inputs, named, nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": OPSET}, name="test"
    )
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION))


def _fake_run(module: fx.GraphModule, values: list[Tensor]) -> dict[fx.Node, Any]:
    """Value of every node, without computing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        interpreter = fx.Interpreter(module, garbage_collect_values=False)
        interpreter.run(*(torch.empty(v.shape, dtype=v.dtype) for v in values))
    return interpreter.env


def _shape(dims: Sequence[Dim]) -> ir.Shape:
    return ir.Shape([d.fixed if d.is_fixed else "batch" if d == Dim(0, 1) else None for d in dims])


def session(model: onnx.ModelProto | bytes, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU with one thread and its default optimizations.

    Args:
        optimized: where to write the graph that is executed.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_onnx(model: onnx.ModelProto | bytes | onnxruntime.InferenceSession, feeds: Sequence[Tensor]) -> list[Tensor]:
    """Outputs for inputs in the model's order."""
    ready = model if isinstance(model, onnxruntime.InferenceSession) else session(model)
    names = [i.name for i in ready.get_inputs()]
    arrays = dict(zip(names, (f.numpy() for f in feeds), strict=True))
    return [torch.from_numpy(np.array(r)) for r in ready.run(None, arrays)]
