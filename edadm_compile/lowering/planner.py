"""Walk a simplified graph and group its nodes into launches.

A matrix product, norm or activation is not launched where it stands: its group stays open, takes in what follows as
long as nobody else reads the value in between, and is emitted when its result is first needed. Values that only
rearrange memory are views and cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.kernels.launch import ConstantSpec, Launch, Operand
from edadm_compile.kernels.library import encode
from edadm_compile.lowering import attention, elements, fusion, matmul, matmul_launch, norms
from edadm_compile.lowering.builder import Builder, Target
from edadm_compile.lowering.groups import (
    QUANTIZE,
    Codes16,
    Deferred,
    ElementGroup,
    Group,
    MatmulGroup,
    NormGroup,
    activation_code,
    is_byte_quantize,
)
from edadm_compile.lowering.layout import as_meta, channels_last, collapse, contiguous, view

_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "permute.default", "transpose.int", "t.default",
        "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default", "flatten.using_ints", "unflatten.int",
        "expand.default", "slice.Tensor", "select.int", "unbind.int", "chunk.default", "split.Tensor",
        "split_with_sizes.default", "movedim.int", "swapaxes.default", "expand_as.default", "view_as.default",
    )
)  # fmt: skip
#: Operators whose result is only described; they are computed when somebody needs the memory.
_DEFERRED = frozenset(("aten.cat.default", "aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default"))


class Planner:
    """One walk over one graph.

    Args:
        program: lowered and specialised (`edadm_compile.lowering.simplify`).
        target: what the plan is for.
        inputs: graph inputs as operands.
        result: where the prediction goes.
        derived: constants of the graph that the program does not hold: how the device makes them.
    """

    def __init__(
        self,
        program: Program,
        target: Target,
        inputs: dict[str, Operand],
        result: Operand,
        derived: dict[str, ConstantSpec] | None = None,
    ) -> None:
        self.derived = derived or {}
        self.module, self.graph = program.graph_module, program.graph_module.graph
        self.build = Builder(target)
        self.result, self.inputs = result, inputs
        self.values: dict[Any, Any] = {}
        self.open: dict[Any, Group] = {}

    # ------------------------------------------------------------------ walk
    def run(self) -> Builder:
        """Plan every node; returns the builder with all launches."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.inputs.get(str(node.target))
            elif node.op == "call_function" and node not in self.values:
                self._visit(node)
            elif node.op == "output":
                self._output(node)
        return self.build

    def _visit(self, node: fx.Node) -> None:
        name = op_name(node.target)
        if not isinstance(node.meta["val"], (Tensor, tuple, list)):
            self.values[node] = node.meta["val"]
        elif name == "operator.getitem" and isinstance(self.values.get(node.args[0]), tuple):
            self.values[node] = self.values[node.args[0]][node.args[1]]
        elif name in _DEFERRED:
            self.values[node] = Deferred(node)
        elif fusion.absorb(self, node) or (name in _VIEWS and self._as_view(node)):
            return
        elif name == QUANTIZE:
            self._quantize(node)
        elif (
            matmul.start(self, node)
            or norms.start(self, node)
            or attention.start(self, node)
            or (activation_code(node) and elements.start_element(self, node))
        ):
            return
        else:
            self.library(node)

    def _as_view(self, node: fx.Node) -> bool:
        source = self.values.get(node.args[0])
        if isinstance(source, Deferred):
            source = self.operand(node.args[0])
        if not isinstance(source, Operand):
            return False
        args = fx.node.map_arg(node.args[1:], lambda n: _plain(self.values[n]))
        kwargs = fx.node.map_arg(node.kwargs, lambda n: _plain(self.values[n]))
        result = view(source, lambda x: node.target(x, *args, **kwargs))  # type: ignore[operator]
        if result is None:
            return False
        self.values[node] = result
        return True

    def _quantize(self, node: fx.Node) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self.operand(source)  # emits the open group that makes the source, which may write these codes as well
        if node not in self.values and not elements.emit_quantize(self, node):
            self.library(node, "no kernel for codes of this memory layout")

    def _output(self, node: fx.Node) -> None:
        final = node.args[0]
        assert isinstance(final, fx.Node)
        value = self.operand(final)
        if value != self.result:
            self.emit_library("aten.clone.default", (value,), {}, self.result, "copy to the output")

    # ---------------------------------------------------------------- values
    def operand(self, node: Any) -> Operand:
        """The value of a node in memory, written by then: emits what is still open."""
        if node.op == "get_attr":
            return self.parameter(node)
        value = self.values[node]
        if isinstance(value, Deferred):
            self.library(value.node)
            value = self.values[node]
        if isinstance(value, Codes16):
            raise AssertionError(f"{node}: 16-bit codes have no single operand")
        assert isinstance(value, Operand), (node, value)
        if value.space == "arena" and value.key in self.open:
            self.close(self.open[value.key])
            value = self.values[node]
            assert isinstance(value, Operand)
        return value

    def parameter(self, node: fx.Node) -> Operand:
        """A constant of the program, floating ones in the store type."""
        value = node.meta["val"]
        dtype = self.stored(value.dtype)
        spec = self.derived.get(str(node.target))
        if spec is not None:
            name = str(dtype).removeprefix("torch.")
            return self.build.constant(spec.source, spec.transform, value.shape, dtype, **spec.arguments, dtype=name)
        return self.build.parameter(str(node.target), value.shape, dtype)

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """Type in memory of a value of the graph: float32 becomes the store type, a type the model asked for stays."""
        return self.build.target.store if dtype == torch.float32 else dtype

    def hold(self, group: Group) -> None:
        """Keep a group open; its buffer stands for its value."""
        self.open[group.out.key] = group
        self.values[group.tail] = group.out

    def close(self, group: Group) -> None:
        """Emit a group."""
        self.open.pop(group.out.key)
        if isinstance(group, MatmulGroup):
            matmul_launch.emit(self, group)
        elif isinstance(group, NormGroup):
            norms.emit(self, group)
        elif isinstance(group, attention.AttentionGroup):
            attention.emit(self, group)
        elif isinstance(group, ElementGroup):
            elements.emit_element(self, group)

    def outputs_of(self, group: Group) -> tuple[bool, fx.Node | None]:
        """Whether the float value of a group is read, and the quantizer it can feed itself."""
        codes = next((u for u in group.tail.users if is_byte_quantize(u)), None)
        return any(u is not codes for u in group.tail.users), codes

    # --------------------------------------------------------------- library
    def library(self, node: fx.Node, why: str = "") -> None:
        """Emit a library launch for a node."""
        args = fx.node.map_arg(node.args, self._library_argument)
        kwargs = fx.node.map_arg(node.kwargs, self._library_argument)
        value = node.meta["val"]
        why = why or (info.note if (info := layer_of(node)) else "") or "no kernel for this operator"
        if isinstance(value, (tuple, list)):
            self.values[node] = tuple(self._library_result(node, args, kwargs, v, why, i) for i, v in enumerate(value))
        else:
            self.values[node] = self._library_result(node, args, kwargs, value, why, None)

    def _library_argument(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            if node.meta["val"].dtype in (torch.int8, torch.uint8, torch.int16):
                return self.build.parameter(str(node.target), node.meta["val"].shape, node.meta["val"].dtype)
            if any(op_name(u.target).startswith("edadm.") for u in node.users if u.op == "call_function"):
                return self.build.parameter(str(node.target), node.meta["val"].shape, torch.float32)
            return self.parameter(node)
        value = self.values[node]
        if isinstance(value, Codes16):
            raise NotImplementedError(f"16-bit codes into {node}")
        return self.operand(node) if isinstance(value, (Operand, Deferred)) else value

    def _library_result(
        self, node: fx.Node, args: Any, kwargs: Any, value: Tensor, why: str, index: int | None
    ) -> Operand:
        dtype = self.stored(value.dtype)
        out = self.build.buffer(value.shape, dtype, node.name, self._library_strides(node, value, args))
        self.emit_library(op_name(node.target), args, kwargs, out, why, node, index)
        return out

    def _library_strides(self, node: fx.Node, value: Tensor, args: Any) -> tuple[int, ...]:
        """Element by element: as the first operand of that shape; attention: heads beside each other; images: channels last."""
        shape = tuple(value.shape)
        for a in args:
            if isinstance(a, Operand) and a.shape == shape and _dense(a):
                if op_name(node.target).split(".")[1] in ("scaled_dot_product_attention", "matmul"):
                    break
                return a.strides
        if value.dim() == 4:
            last = (
                as_meta_order(shape, (0, 2, 1, 3))
                if "attention" in str(node.target) or "matmul" in str(node.target)
                else None
            )
            return last or channels_last(shape)
        return contiguous(shape)

    def emit_library(
        self,
        name: str,
        args: Any,
        kwargs: Any,
        out: Operand,
        why: str,
        node: fx.Node | None = None,
        index: int | None = None,
    ) -> None:
        """Append a library launch."""
        operands: dict[str, Operand] = {}
        call = [name, encode(list(args), operands), {k: encode(v, operands) for k, v in kwargs.items()}]
        operands["out"] = out
        info = layer_of(node) if node is not None else None
        label = info.name if info else (node.name if node is not None else name)
        constants = {} if index is None else {"result": index}
        self.build.launch(Launch("torch", label, operands, constants, why_float=why, call=call))


def as_meta_order(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions lie in memory in `order`, outermost first."""
    strides = [0] * len(shape)
    step = 1
    for d in reversed(order):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def _dense(operand: Operand) -> bool:
    order = sorted(range(len(operand.shape)), key=lambda d: -operand.strides[d])
    found = collapse([operand.shape[d] for d in order], [operand.strides[d] for d in order])
    return found is not None and found[1] <= 1


def _plain(value: Any) -> Any:
    return as_meta(value) if isinstance(value, Operand) else value
