"""Insert simulated quantizers in front of every layer that was given integer widths."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import fx

from edadm_compile.ir.analysis import is_layer, layer_weight, weight_node
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import LayerInfo, Program, layer_of
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant
from edadm_compile.quant.spec import act_spec, weight_spec

#: What canonicalization appends to the name of a weight it had to rewrite.
_SUFFIX = re.compile(r"_(folded|2d|t|bn|phases)\d*$")


def layer_name(node: fx.Node) -> str:
    """Module path of a layer: its weight's name without ``.weight``."""
    weight = weight_node(node)
    assert weight is not None
    name = str(weight.target)
    while (shorter := _SUFFIX.sub("", name)) != name:
        name = shorter
    return name.removesuffix(".parametrizations.weight.original").removesuffix(".weight") or name


def weight_axis(node: fx.Node) -> int:
    """Dimension of a layer's weight that counts output channels."""
    return 1 if "transpose" in op_name(node.target) else 0


@dataclass(frozen=True)
class InsertQuant:
    """Float graph to fake_quant graph.

    1. layer(x, W, ...) → layer(ActFakeQuant(x), WeightFakeQuant(W), ...); layers that read the same value with the
       same width share one activation quantizer
    2. matmul(a, b) annotated for int8 → matmul(ActFakeQuant(a), ActFakeQuant(b))
    3. with ``deploy = "onnxruntime"``: convolution that writes codes there → ActFakeQuant(convolution), 8 bits with a
       scale per channel, for all its readers; behind the pixels where the convolution computes phases of them
    """

    name: str = "insert_quant"
    reads: str = "float"
    writes: str = "fake_quant"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Insert the quantizers; they do nothing until `calibrate` gives them scales."""
        module = program.graph_module
        module.add_module("act_quant", torch.nn.Module())
        module.add_module("weight_quant", torch.nn.Module())
        shared: dict[tuple[fx.Node, int], fx.Node] = {}
        outputs = 0
        for node in list(module.graph.nodes):
            info = layer_of(node)
            if info is None or info.act_bits == 32:
                continue
            if ctx.config.deploy == "onnxruntime" and writes_codes(node, info):
                _quantize_output(program, node, pixels_of(node))
                outputs += 1
            if is_layer(node):
                x = _quantize_input(program, node, node.args[0], info, shared)
                node.args = (x, _quantize_weight(program, node, info), *node.args[2:])
            else:
                node.args = tuple(_quantize_input(program, node, a, info, shared) for a in node.args[:2])
        program = finish(replace(program, dialect="fake_quant"))
        return PassResult(program, True, {"activation_quantizers": len(shared), "output_quantizers": outputs})


def _quantize_output(program: Program, node: fx.Node, value: fx.Node) -> None:
    """Rule 3."""
    module = program.graph_module
    name = f"act_quant.{node.name}_output"
    module.add_submodule(name, ActFakeQuant(act_spec(8)))
    readers = list(value.users)
    with module.graph.inserting_after(value):
        quantizer = module.graph.call_module(name, (value,))
    quantizer.meta = {k: v for k, v in value.meta.items() if k not in ("layer", "split_of")} | {
        "output_quantizer": True
    }
    for reader in readers:
        reader.replace_input_with(value, quantizer)


def _quantize_input(
    program: Program, node: fx.Node, source: fx.Node, info: LayerInfo, shared: dict[tuple[fx.Node, int], fx.Node]
) -> fx.Node:
    key = (source, info.act_bits)
    if key not in shared:
        module = program.graph_module
        name = f"act_quant.{source.name}_{info.act_bits}"
        module.add_submodule(name, ActFakeQuant(act_spec(info.act_bits)))
        place = source
        while place.next.op == "placeholder":  # inputs stay in front
            place = place.next
        with module.graph.inserting_after(place):
            shared[key] = module.graph.call_module(name, (source,))
        shared[key].meta = {k: v for k, v in source.meta.items() if k not in ("layer", "output_quantizer")}
    return shared[key]


def _quantize_weight(program: Program, node: fx.Node, info: LayerInfo) -> fx.Node:
    module = program.graph_module
    axis = weight_axis(node)
    weight = layer_weight(program, node)
    name = f"weight_quant.{node.name}"
    module.add_submodule(name, WeightFakeQuant(weight_spec(info.weight_bits, axis), weight.shape[axis]))
    with module.graph.inserting_before(node):
        return module.graph.call_module(name, (node.args[1],))
