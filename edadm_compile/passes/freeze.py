"""Turn simulated quantizers into quantize/dequantize pairs around integer constants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.program import Program, child_name, get_constant, layer_of, set_constant
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.passes.calibrate import activation_quantizers, weight_quantizers
from edadm_compile.quant import packing

edadm = torch.ops.edadm


@dataclass(frozen=True)
class Freeze:
    """fake_quant graph to qdq graph.

    1. ActFakeQuant(x) → edadm::dequantize(edadm::quantize(x, s, z), s, z)
    2. WeightFakeQuant(W) → edadm::dequantize_weight(packed codes, s); the float weight leaves the program
    """

    name: str = "freeze"
    reads: str = "fake_quant"
    writes: str = "qdq"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Replace every quantizer."""
        for node, quantizer in list(activation_quantizers(program)):
            base = f"activations.{node.args[0].name}_{quantizer.spec.bits}"  # type: ignore[union-attr]
            scale = _constant(program, node, f"{base}.scale", quantizer.scale)
            zero = _constant(program, node, f"{base}.zero_point", quantizer.zero_point)
            bits, symmetric = quantizer.spec.bits, quantizer.spec.symmetric
            with program.graph_module.graph.inserting_before(node):
                codes = program.graph_module.graph.call_function(
                    edadm.quantize.default, (node.args[0], scale, zero, bits, symmetric)
                )
                value = program.graph_module.graph.call_function(edadm.dequantize.default, (codes, scale, zero))
            _replace(node, value)
        for node, weight_quantizer in list(weight_quantizers(program)):
            layer = next(iter(node.users))
            info = layer_of(layer)
            assert info is not None
            weight = get_constant(program.graph_module, str(node.args[0].target))  # type: ignore[union-attr]
            codes_t = weight_quantizer.integer_codes(weight)
            axis = weight_quantizer.spec.axis or 0
            stored = codes_t.transpose(0, axis).contiguous()  # output channels first, whatever the layer
            packed = _constant(
                program,
                node,
                child_name(program.graph_module, info.name, "weight_q"),
                packing.pack(stored, info.weight_bits),
            )
            scale = _constant(
                program, node, child_name(program.graph_module, info.name, "weight_scale"), weight_quantizer.scale
            )
            arguments = (packed, scale, info.weight_bits, list(stored.shape), axis)
            with program.graph_module.graph.inserting_before(node):
                value = program.graph_module.graph.call_function(edadm.dequantize_weight.default, arguments)
            _replace(node, value)
        program = finish(replace(program, dialect="qdq"))
        program = program.fork()  # drops the quantizers and the float weights
        propagate_shapes(program)
        return PassResult(program, True)


def _constant(program: Program, node: fx.Node, name: str, value: Tensor) -> fx.Node:
    set_constant(program.graph_module, name, value.detach().contiguous())
    with program.graph_module.graph.inserting_before(node):
        return program.graph_module.graph.get_attr(name)


def _replace(node: fx.Node, value: fx.Node) -> None:
    value.meta = {k: v for k, v in node.meta.items() if k in ("scope", "shape", "batched")}
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
