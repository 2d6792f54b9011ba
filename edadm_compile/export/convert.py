"""A qdq program as an ONNX model in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import fx

import edadm_compile
from edadm_compile.export import time
from edadm_compile.export.builder import DTYPES, Builder
from edadm_compile.export.operators import FLOAT_TABLE, codes, layers
from edadm_compile.export.operators.layers import absorbed_padding
from edadm_compile.export.operators.phases import pixels_behind
from edadm_compile.export.prepare import is_integer_layer, prepare, two_sizes
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.export.targets import OnnxTarget
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import writes_codes
from edadm_compile.ir.program import InputSpec, LayerInfo, Program, layer_of, placeholders
from edadm_compile.ir.quantizers import DEQUANTIZE, QUANTIZE

#: INT4 constants need opset 21; nothing newer is used.
OPSET, IR_VERSION = 21, 10
OUTPUT = "out_sample"  # as diffusers' own exporters call it


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of the program in the ONNX graph.

    Attributes:
        node: in the prepared program.
        info: its record.
        products: names of its convolutions and matrix products; they keep them in ONNX Runtime's optimized graph.
        codes: its inputs as 8-bit codes (two for a 16-bit input, or for a product of two activations); empty for a layer
            in float.
        sources: the nodes whose codes `codes` are (one for a 16-bit input).
        moved: a padding that the graph does in the convolution, to be applied to the codes for comparison.
        output: its codes where it writes codes, else its float value.
        pixels: the node whose codes `output` is, where the layer computes phases of an image.
        quantizer: node that made those codes.
    """

    node: fx.Node
    info: LayerInfo
    products: tuple[str, ...]
    codes: tuple[ir.Value, ...] = ()
    sources: tuple[fx.Node, ...] = ()
    moved: fx.Node | None = None
    output: ir.Value | None = None
    quantizer: fx.Node | None = None
    pixels: fx.Node | None = None

    @property
    def result(self) -> fx.Node:
        """The node whose codes or float value `output` is."""
        return self.pixels or self.quantizer or self.node


@dataclass(frozen=True)
class Exported:
    """An ONNX model and the program it was written from.

    Attributes:
        model: the graph.
        prepared: the program after `prepare`.
        target: what it is for.
        layers: the layers in execution order, with what belongs to them in the graph.
    """

    model: ir.Model
    prepared: Program
    target: OnnxTarget
    layers: tuple[ExportedLayer, ...]


def convert(program: Program, target: OnnxTarget, *, int4: bool = False, scalar_time: bool = False) -> Exported:
    """Write a qdq program as an ONNX model.

    Inputs have the names of the source model's: x [batch, ...] float32, the timestep [steps] with one entry per image or
    one for all, conditions. The output is `OUTPUT`.

    Args:
        int4: store weights of up to 4 bits as INT4 constants.
        scalar_time: the timestep is a scalar, as diffusion pipelines on ONNX Runtime give it.

    Raises:
        ExportError: something in the program has no ONNX form.
    """
    prepared = prepare(program, target)
    table = emitters()
    builder = Builder()
    builder.unique(OUTPUT)  # whatever layers and inputs are called
    signature = prepared.signature
    fixed = signature.min_batch if signature.min_batch == signature.max_batch else None
    inputs = [_input(builder, spec, fixed, scalar_time) for spec in signature.inputs]
    values, sizes = two_sizes(prepared)
    scope = Scope(prepared.graph_module, builder, table, values, sizes)
    scope.signed, scope.int4, scope.plain_layers = target.signed, int4, not target.output_codes
    scope.batch = builder.op("Shape", inputs[0], start=0, end=1, name="batch")
    t = builder.op("Expand", inputs[1], scope.batch, name="timesteps")
    arguments: list[Emitted] = [inputs[0], t, *inputs[2:]]
    names = placeholders(prepared.graph_module.graph)[len(inputs):]  # fmt: skip
    if names:
        arguments += time.table_rows(builder, prepared, t, table, names)
    result = scope.run(arguments)[0]
    result = builder.op("Identity", result)
    result.name = OUTPUT
    result.type = ir.TensorType(ir.DataType.FLOAT)
    output = prepared.graph_module.graph.output_node().args[0]
    result.shape = _shape(scope.dims(output), fixed)  # type: ignore[arg-type]
    graph = ir.Graph(
        inputs, [result], nodes=builder.nodes, initializers=builder.initializers, opset_imports={"": OPSET},
        name="unet",
    )  # fmt: skip
    model = ir.Model(
        graph, ir_version=IR_VERSION, producer_name="edadm-compile", producer_version=edadm_compile.__version__
    )
    common.RemoveUnusedNodesPass()(model)
    return Exported(model, prepared, target, tuple(_layer(scope, node) for node in scope.products))


def _layer(scope: Scope, node: fx.Node) -> ExportedLayer:
    info = layer_of(node)
    assert info is not None
    plain = ExportedLayer(node, info, tuple(scope.products[node]))
    if info.weight_bits == 32 or not is_integer_layer(node):
        return plain
    dequantizers: list[Any] = [a for a in node.args[:2] if op_name(getattr(a, "target", "")) == DEQUANTIZE]
    sources: list[fx.Node] = [d.args[0] for d in dequantizers]
    moved = absorbed_padding(scope, node)
    if moved is not None:
        sources = [moved.args[0]]  # type: ignore[list-item]
    found = [scope.emitted[s] for s in sources]
    codes_ = tuple(v for f in found for v in (f if isinstance(f, tuple) else (f,)))
    readers = list(node.users)
    coded = writes_codes(node, info) and [op_name(u.target) for u in readers] == [QUANTIZE]
    pixels = pixels_behind(node) if coded and isinstance(scope.emitted[node], tuple) else None
    facts = replace(
        plain, codes=codes_, sources=tuple(sources), moved=moved, quantizer=readers[0] if coded else None, pixels=pixels
    )
    output = scope.emitted[facts.result]
    assert isinstance(output, ir.Value)
    return replace(facts, output=output)


def emitters() -> dict[str, Emitter]:
    """Every operator that a qdq program may call and that has an ONNX form."""
    return {**FLOAT_TABLE, **codes.TABLE, **layers.table(FLOAT_TABLE)}


def _input(builder: Builder, spec: InputSpec, fixed: int | None, scalar_time: bool) -> ir.Value:
    batch: list[int | str] = [fixed if fixed is not None else "batch"]
    if spec.role == "t":
        batch = [] if scalar_time else ["steps"]
    shape = ir.Shape([*batch, *spec.shape])
    return ir.Value(name=builder.unique(spec.name), shape=shape, type=ir.TensorType(DTYPES[spec.dtype]))


def _shape(dims: tuple[Dim, ...], fixed: int | None) -> ir.Shape:
    return ir.Shape([d.fixed if d.is_fixed else "batch" for d in dims])


def describe(model: ir.Model, **facts: object) -> None:
    """Keep facts about the origin with the model, as JSON text by name."""
    for name, value in facts.items():
        model.metadata_props[f"edadm.{name}"] = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
