"""One fx graph on its way to ONNX: values by node, shapes with the batch left open, and the table of emitters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from edadm_compile.errors import ExportError
from edadm_compile.export.builder import DTYPES, Builder
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import get_constant, layer_of

#: What an emitter returns: one ONNX value, or several for operators with a list as result.
Emitted = ir.Value | tuple[ir.Value, ...]
Emitter = Callable[["Scope", fx.Node], Emitted]


_PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum")


@dataclass(frozen=True)
class Dim:
    """A size ``fixed + per_image * batch``; the batch is open unless `per_image` is 0."""

    fixed: int
    per_image: int = 0

    @property
    def is_fixed(self) -> bool:
        """Whether the size does not depend on the batch."""
        return self.per_image == 0


class Scope:
    """Converts the nodes of one graph, one emitter call per node.

    Args:
        module: the graph and its constants.
        builder: receives the ONNX nodes.
        table: emitter by operator name.
        values: for two batch sizes the (fake) value of every node, and those sizes.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        builder: Builder,
        table: dict[str, Emitter],
        values: tuple[dict[fx.Node, Any], dict[fx.Node, Any]],
        sizes: tuple[int, int],
    ) -> None:
        self.module, self.builder, self.table = module, builder, table
        self._values, self._sizes = values, sizes
        self.signed = False  # activation codes are int8, otherwise uint8
        self.int4 = False  # weights of up to 4 bits are stored as INT4
        self.plain_layers = False  # layers keep their own form, with float biases and float outputs
        self.emitted: dict[fx.Node, Emitted] = {}
        self.batch: ir.Value | None = None  # int64 [1], the batch size at run time
        self.products: dict[fx.Node, list[str]] = {}  # layer -> names of its ONNX convolutions and matrix products

    # -- facts -------------------------------------------------------------------------------------------------

    def dims(self, node: fx.Node) -> tuple[Dim, ...]:
        """Sizes of a tensor value."""
        first, second = (run[node] for run in self._values)
        return tuple(self._dim(a, b) for a, b in zip(first.shape, second.shape, strict=True))

    def rank(self, node: fx.Node) -> int:
        """Number of dimensions of a tensor value."""
        return int(self._values[0][node].dim())

    def dtype(self, arg: Any) -> torch.dtype:
        """Type of a tensor value; of a Python number the one torch gives it."""
        if isinstance(arg, fx.Node):
            value = self._values[0][arg]
            return value.dtype if isinstance(value, Tensor) else self.dtype(value)
        return torch.bool if isinstance(arg, bool) else torch.int64 if isinstance(arg, int) else torch.float32

    def is_tensor(self, arg: Any) -> bool:
        """Whether an argument is a node with a tensor as its value."""
        return isinstance(arg, fx.Node) and isinstance(self._values[0][arg], Tensor)

    def plain(self, arg: Any) -> Any:
        """An argument with nodes of plain numbers replaced by those; `Dim` for one that depends on the batch."""
        if isinstance(arg, fx.Node):
            first, second = (run[arg] for run in self._values)
            if first == second:
                return first
            if isinstance(first, (bool, float)):
                raise ExportError(f"{arg.name} is a number that depends on the batch but is not a size")
            return self._dim(int(first), int(second))
        if isinstance(arg, (list, tuple)):
            return [self.plain(a) for a in arg]
        return arg

    def _dim(self, first: int, second: int) -> Dim:
        if first == second:
            return Dim(first)
        per_image, rest = divmod(second - first, self._sizes[1] - self._sizes[0])
        fixed = first - per_image * self._sizes[0]
        if rest:  # a rounded share of the batch
            raise ExportError(f"a size is no multiple of the batch ({first} and {second} for batches of {self._sizes})")
        return Dim(fixed, per_image)

    # -- values ------------------------------------------------------------------------------------------------

    def value(self, arg: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """ONNX value of a tensor argument or a number, cast to `dtype` where that differs."""
        if not isinstance(arg, fx.Node):
            return self.builder.constant(arg, dtype=dtype)
        if not self.is_tensor(arg):
            plain = self.plain(arg)
            if not isinstance(plain, Dim):
                return self.builder.constant(plain, dtype=dtype)
            number = self.reshape(self.size(plain), ())
            return number if dtype is None else self.builder.op("Cast", number, to=DTYPES[dtype])
        found = self.emitted[arg]
        assert isinstance(found, ir.Value)
        if dtype is None or dtype == self.dtype(arg):
            return found
        return self.builder.op("Cast", found, to=DTYPES[dtype], name=f"{arg.name}.cast")

    def constant_of(self, arg: Any) -> Tensor | None:
        """The tensor behind a constant node, else None."""
        if isinstance(arg, fx.Node) and arg.op == "get_attr":
            return get_constant(self.module, str(arg.target))
        return None

    def op(self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: Any) -> ir.Value:
        """Append a node; see `Builder.op`."""
        return self.builder.op(op_type, *inputs, name=name, **attributes)

    def const(self, value: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A constant; see `Builder.constant`."""
        return self.builder.constant(value, dtype)

    def sizes(self, dims: Sequence[Dim]) -> ir.Value:
        """int64 [rank] of sizes, computed from the batch at run time where they depend on it."""
        if all(d.is_fixed for d in dims):
            return self.const([d.fixed for d in dims])
        return self.op("Concat", *(self.size(d) for d in dims), axis=0)

    def size(self, dim: Dim) -> ir.Value:
        """int64 [1] of one size."""
        if dim.is_fixed:
            return self.const([dim.fixed])
        assert self.batch is not None
        scaled = self.batch if dim.per_image == 1 else self.op("Mul", self.batch, self.const([dim.per_image]))
        return scaled if dim.fixed == 0 else self.op("Add", scaled, self.const([dim.fixed]))

    def reshape(self, value: ir.Value, dims: Sequence[Dim], have: Sequence[Dim] = (), name: str = "") -> ir.Value:
        """Reshape to `dims`; sizes that depend on the batch are left to ONNX (-1, or 0 for the same as in `have`)."""
        target = [d.fixed if d.is_fixed else None for d in dims]
        for index, dim in enumerate(dims):
            if target[index] is None and index < len(have) and have[index] == dim:
                target[index] = 0
        if target.count(None) == 1:
            target[target.index(None)] = -1
        if None in target or (0 in target and any(d.is_fixed and d.fixed == 0 for d in dims)):
            return self.op("Reshape", value, self.sizes(dims), name=name)
        return self.op("Reshape", value, self.const(target), name=name)

    # -- conversion --------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Emitted]) -> list[ir.Value]:
        """Convert every node; returns the outputs of the graph.

        Args:
            inputs: values of the graph's placeholders, in order.

        Raises:
            ExportError: an operator, or one of its arguments, has no ONNX form here.
        """
        waiting = list(inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.emitted[node] = waiting.pop(0)
            elif node.op == "get_attr":
                if any(not self._is_special(user) for user in node.users):
                    self.emitted[node] = self.builder.constant(
                        get_constant(self.module, str(node.target)), name=str(node.target)
                    )
            elif node.op == "output":
                result = node.args[0]
                return [self.value(n) for n in (result if isinstance(result, (list, tuple)) else [result])]
            elif self._is_value(node):
                self.emitted[node] = self._emit(node)
        raise AssertionError("graph without an output")

    def _is_special(self, user: fx.Node) -> bool:
        """Readers that look their constants up themselves, so that these need not be stored as they are."""
        return op_name(user.target).startswith("edadm.")

    def _is_value(self, node: fx.Node) -> bool:
        value = self._values[0][node]
        return isinstance(value, Tensor) or (
            isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)
        )

    def _emit(self, node: fx.Node) -> Emitted:
        name = op_name(node.target)
        if name == "operator.getitem":
            items = self.emitted[node.args[0]]  # type: ignore[index]
            return items[node.args[1]]  # type: ignore[index]
        if name not in self.table:
            raise ExportError(f"{self.place(node)}: operator {name} has no ONNX form in this version")
        before = len(self.builder.nodes)
        try:
            result = self.table[name](self, node)
        except ExportError as error:
            raise ExportError(f"{self.place(node)}: {error}") from None
        if layer_of(node) is not None:
            self.products[node] = [str(n.name) for n in self.builder.nodes[before:] if n.op_type in _PRODUCTS]
        return result

    def place(self, node: fx.Node) -> str:
        """Where in the model a node is, for messages."""
        info = layer_of(node)
        scope = (node.meta.get("scope") or ("",))[-1]
        return f"layer {info.name}" if info is not None else f"node {node.name}" + (f" in {scope}" if scope else "")
