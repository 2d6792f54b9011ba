"""A program: a graph in one dialect, and what is needed to call it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import InputError
from edadm_compile.ir.timesteps import as_timesteps


@dataclass(frozen=True)
class InputSpec:
    """One input of the captured model.

    Attributes:
        name: parameter name in the source model's forward.
        shape: sizes without the batch dimension.
        dtype: torch dtype.
        role: "x" (noisy sample), "t" (timestep) or "cond".
        num_classes: for integer labels drawn at random in calibration, else None.
        required: False when the source model has a default for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: str
    num_classes: int | None = None
    required: bool = True


@dataclass(frozen=True)
class Signature:
    """How the source model is called and what it returns.

    Attributes:
        inputs: in positional order, x first and t second.
        output: "tensor", or "sample" for diffusers' output object with ``.sample``.
        max_batch: largest batch the captured graph accepts; larger ones are run in slices.
        min_batch: equal to `max_batch` when capture had to fix the batch.
        source: class or factory the model came from, for display.
    """

    inputs: tuple[InputSpec, ...]
    output: str
    max_batch: int
    min_batch: int = 1
    source: str = ""

    @property
    def conditions(self) -> tuple[InputSpec, ...]:
        """Inputs after x and t."""
        return self.inputs[2:]

    def batches(self, inputs: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], int]]:
        """Slices of `inputs` [N, ...] that the captured graph accepts, each with how many of its rows count.

        A graph with a fixed batch needs the last slice filled up: its first rows are repeated.
        """
        for piece in zip(*(v.split(self.max_batch) for v in inputs), strict=True):
            rows = piece[0].shape[0]
            size = max(rows, self.min_batch)
            yield [v.repeat(-(-size // rows), *[1] * (v.dim() - 1))[:size] for v in piece], rows


@dataclass(frozen=True)
class SamplerSpec:
    """Which sampler the program is compiled for.

    Attributes:
        scheduler: diffusers scheduler configuration with its ``_class_name``.
        steps: number of inference steps.
        eta: DDIM noise level, 0 is deterministic.
        guidance: scale s of classifier-free guidance, ``u + s (c - u)`` with u predicted without and c with the
            condition; 1 is the conditional prediction alone.
        null: condition rows [...] of the unconditional branch in signature order, None for a condition that is the
            same in both; empty where there is no such branch.
    """

    scheduler: dict[str, Any]
    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    null: tuple[Tensor | None, ...] = field(default=(), compare=False)

    @property
    def guided(self) -> bool:
        """Whether the sampler needs the model with and without the condition."""
        return self.guidance != 1.0

    @property
    def branches(self) -> int:
        """Rows that the model is called with for each image."""
        return 2 if self.guided else 1


@dataclass(frozen=True)
class TimeTables:
    """Values of the time path at the timesteps known at compile time.

    Attributes:
        keys: float64 [S], the timesteps, ascending.
        tables: graph input name -> float32 [S, ...].
        path: graph from t [B] to the folded values in the order of `path_outputs`, for any other t; None when the
            tables hold every timestep of the schedule.
        path_outputs: the entries of `tables` that `path` computes.
        folded: names of the layers that no longer run.
    Tables not in `path_outputs` (the mean correction) are interpolated linearly between keys.
    """

    keys: Tensor
    tables: dict[str, Tensor]
    path: fx.GraphModule | None = None
    path_outputs: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()

    def lookup(self, t: Tensor) -> dict[str, Tensor]:
        """Rows of every table for timesteps `t` [B]; exact for keys.

        Raises:
            InputError: a timestep is not in a complete table.
        """
        keyed = t.double()
        position = torch.searchsorted(self.keys, keyed).clamp(max=self.keys.numel() - 1)
        known = bool((self.keys[position] == keyed).all())
        if known:
            return {name: table[position] for name, table in self.tables.items()}
        if self.path is None and self.path_outputs:
            raise InputError(
                f"timestep: got {t.tolist()}, allowed are the integers 0 to {int(self.keys[-1])} of the schedule"
            )
        return self._unknown(t, position)

    def _unknown(self, t: Tensor, right: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.path is not None:
            outputs = self.path(t)
            values.update(zip(self.path_outputs, outputs, strict=True))
        left = (right - 1).clamp(min=0)
        gap = (self.keys[right] - self.keys[left]).clamp(min=1e-12)
        weight = ((t.double() - self.keys[left]) / gap).clamp(0, 1).float()
        for name, table in self.tables.items():
            if name not in values:
                w = weight.reshape(-1, *[1] * (table.dim() - 1))
                values[name] = table[left] * (1 - w) + table[right] * w
        return values


@dataclass(frozen=True)
class LayerInfo:
    """What is known of one quantizable layer; kept in ``node.meta["layer"]``.

    Attributes:
        name: module path of its weight in the source model (``.partN`` for a piece of a split concatenation).
        kind: conv2d, conv_transpose2d, linear or matmul.
        weight_shape: logical weight shape ([] for matmul).
        role: "stem" (reads x), "head" (writes the output), "conditioning" (does not depend on x) or "inner".
        weight_bits, act_bits: requested widths; 32 means float.
        executed: widths that run, for example "w4a8", or "float".
        note: why the widths differ from the request, or why it stays float.
        out_scale, out_zero_point: calibrated scale and zero point (of codes in [-128, 127]) of each output channel of a
            convolution, for engines whose integer convolution writes codes; None for other layers.
        float_output: such engines must give this convolution a float output all the same (codes cost too much there).
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    role: str = "inner"
    weight_bits: int = 32
    act_bits: int = 32
    executed: str = "float"
    note: str = ""
    out_scale: tuple[float, ...] | None = None
    out_zero_point: tuple[int, ...] | None = None
    float_output: bool = False


@dataclass(frozen=True)
class Program:
    """A captured model in one dialect.

    Attributes:
        graph_module: the graph; its inputs are the signature's inputs followed by the time tables' names.
        dialect: "float", "fake_quant", "qdq" or "lowered".
        signature: how to call it.
        sampler: which sampler it is compiled for.
        time: folded time path, if any.
        notes: remarks of the passes for the user.
    """

    graph_module: fx.GraphModule
    dialect: str
    signature: Signature
    sampler: SamplerSpec
    time: TimeTables | None = None
    notes: tuple[str, ...] = field(default=())

    def fork(self) -> Program:
        """The same program with its own copy of the graph; tensors and quantizers are shared, not copied."""
        source = self.graph_module
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(source.graph, mapping)
        graph.output(output)
        for old, new in mapping.items():
            new.meta = copy.copy(old.meta)
        return replace(self, graph_module=fx.GraphModule(source, graph))

    def with_note(self, note: str) -> Program:
        """A program with one more remark."""
        return replace(self, notes=(*self.notes, note))

    def at_most(self, rows: int) -> Program:
        """The same program, called with at most so many rows at a time; with a fixed batch it stays as it is."""
        most = max(self.signature.min_batch, min(rows, self.signature.max_batch))
        return replace(self, signature=replace(self.signature, max_batch=most))

    def graph_inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Arguments of the graph for the model inputs: those themselves, then the rows of the time tables."""
        values = list(inputs)
        if self.time is not None:
            rows = self.time.lookup(inputs[1])
            names = placeholders(self.graph_module.graph)
            values += [rows[name] for name in names[len(inputs):]]  # fmt: skip
        return values

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the graph on x [B, ...], t [B] and conditions; other batches than captured are sliced and filled up."""
        t = as_timesteps(inputs[1], self.signature.inputs[1].dtype)
        inputs = (inputs[0], t, *inputs[2:])
        if not self.signature.min_batch <= inputs[0].shape[0] <= self.signature.max_batch:
            return torch.cat([self(*piece)[:rows] for piece, rows in self.signature.batches(inputs)])
        result: Tensor = self.graph_module(*self.graph_inputs(inputs))
        return result


def text_of(shape: Sequence[int]) -> str:
    """``C,H,W`` as ``--shape`` takes it."""
    return ",".join(map(str, shape))


def placeholders(graph: fx.Graph) -> list[str]:
    """Names of the graph inputs, in order."""
    return [str(node.target) for node in graph.nodes if node.op == "placeholder"]


def constants_of(program: Program) -> dict[str, Tensor]:
    """Constants that a program reads, by name."""
    module = program.graph_module
    return {str(n.target): get_constant(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}


def get_constant(module: torch.nn.Module, target: str) -> Tensor:
    """The tensor behind a ``get_attr`` target such as ``down.0.conv.weight``."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def set_constant(module: torch.nn.Module, target: str, value: Tensor) -> None:
    """Store `value` as a buffer under a dotted name, making empty modules on the way."""
    *path, leaf = target.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_buffer(leaf, value.detach())


def child_name(module: torch.nn.Module, base: str, leaf: str) -> str:
    """A dotted name for a constant that belongs to `base`: ``base.leaf``, or ``base_leaf`` where `base` is itself a tensor."""
    value: Any = module
    for part in base.split("."):
        value = getattr(value, part, None)
    return f"{base}_{leaf}" if isinstance(value, Tensor) else f"{base}.{leaf}"


def layer_of(node: fx.Node) -> LayerInfo | None:
    """The layer record of a node, if it has one."""
    info: LayerInfo | None = node.meta.get("layer")
    return info


def layers(program: Program) -> list[LayerInfo]:
    """All layer records in execution order."""
    return [info for node in program.graph_module.graph.nodes if (info := layer_of(node)) is not None]
