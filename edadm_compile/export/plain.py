"""Rewrites for consumers with fewer forms of codes than ONNX Runtime: rules 6, 7 and 9 of `export.prepare`."""

from __future__ import annotations

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import Program, get_constant, layer_of, set_constant
from edadm_compile.ir.quantizers import DEQUANTIZE, QUANTIZE


def drop_wide_codes(graph: fx.Graph) -> None:
    """Rule 7."""
    for node in list(graph.nodes):
        if op_name(node.target) != DEQUANTIZE:
            continue
        source = node.args[0]  # 16-bit codes are not moved: their quantizer is here
        if op_name(source.target) == QUANTIZE and source.args[3] == 16:
            node.replace_all_uses_with(source.args[0])
    graph.eliminate_dead_code()


def drop_output_codes(graph: fx.Graph) -> None:
    """Rule 9; a quantizer that another layer reads is that layer's own and stays."""
    for node in list(graph.nodes):
        info = layer_of(node)
        if info is None or not writes_codes(node, info):
            continue
        value = pixels_of(node)
        for quantizer in [u for u in value.users if op_name(u.target) == QUANTIZE]:
            readers = list(quantizer.users)
            if all(op_name(r.target) == DEQUANTIZE and not any(layer_of(u) for u in r.users) for r in readers):
                for reader in readers:
                    reader.replace_all_uses_with(value)
    graph.eliminate_dead_code()


def make_symmetric(program: Program) -> None:
    """Rule 6: codes [-127, 127] that reach the farther end of the old range."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if op_name(node.target) != QUANTIZE or node.args[3] > 8 or node.args[4]:
            continue
        scale, zero = (get_constant(module, str(a.target)) for a in node.args[1:3])
        high = 2 ** (node.args[3] - 1) - 1
        reach = torch.maximum((high - zero) * scale, (zero + high + 1) * scale)
        for argument_, value in zip(node.args[1:3], (reach / high, torch.zeros_like(zero)), strict=True):
            set_constant(module, f"symmetric.{argument_.target}", value)
        _retarget(module, node)


def _retarget(module: fx.GraphModule, node: fx.Node) -> None:
    """Point a quantizer and the dequantizers of its codes to the symmetric constants."""
    with module.graph.inserting_before(node):
        scale, zero = (module.graph.get_attr(f"symmetric.{a.target}") for a in node.args[1:3])  # type: ignore[union-attr]
    node.args = (node.args[0], scale, zero, node.args[3], True)
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if op_name(user.target) == DEQUANTIZE:
            user.args = (user.args[0], scale, zero)
        else:
            if op_name(user.target) == "aten.constant_pad_nd.default":
                user.args = (*user.args[:2], 0)
            stack.extend(user.users)
