"""Convolutions of upsampled images without the redundant products, for engines where products are what costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import is_layer, propagate_shapes, shape_of
from edadm_compile.ir.arguments import argument, pair
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, set_constant
from edadm_compile.passes.base import Context, PassResult, finish

aten = torch.ops.aten
_NEAREST = ("aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default")


@dataclass(frozen=True)
class UpsamplePhases:
    """Float graph to float graph; runs only with ``deploy = "onnxruntime"``.

    1. conv2d_3x3(upsample_nearest_2x(x), W) → crop(pixel_shuffle(conv2d_2x2(x, W'))): two rows of the upsampled image out
       of three are the same row of x, so that ``W'[a] = R_a W R_bᵀ`` for each of the four phases (a, b) of the result, with
       ``R_0 = [[1, 0, 0], [0, 1, 1]]`` and ``R_1 = [[1, 1, 0], [0, 0, 1]]``: 4 products for each 9

    Exact up to rounding. The 2x2 windows of all phases start at the same (H + 1) (W + 1) places.
    """

    name: str = "upsample_phases"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rewrite every matching convolution."""
        if ctx.config.deploy != "onnxruntime":
            return PassResult(program, False, {"phases": 0})
        count = 0
        for node in list(program.graph_module.graph.nodes):
            if _matches(program, node):
                _rewrite(program, node)
                count += 1
        program = finish(program)
        propagate_shapes(program)
        return PassResult(program, count > 0, {"phases": count})


def _matches(program: Program, node: fx.Node) -> bool:
    if op_name(node.target) != "aten.conv2d.default" or not is_layer(node):
        return False
    upsample = node.args[0]
    if not isinstance(upsample, fx.Node) or op_name(upsample.target) not in _NEAREST or len(upsample.users) > 1:
        return False
    small, large = shape_of(upsample.args[0]), shape_of(upsample)  # type: ignore[arg-type]
    doubled = len(small) == 4 and tuple(2 * n for n in small[2:]) == large[2:]
    defaults = {"stride": 1, "padding": 0, "dilation": 1}
    plain = all(pair(argument(node, 3 + i, *item)) == [1, 1] for i, item in enumerate(defaults.items()))
    weight = get_constant(program.graph_module, str(node.args[1].target))  # type: ignore[union-attr]
    return doubled and plain and argument(node, 6, "groups", 1) == 1 and weight.shape[2:] == (3, 3)


def phase_weights(weight: Tensor) -> Tensor:
    """Weights of the 2x2 windows, float [4 O, C, 2, 2], for a kernel [O, C, 3, 3].

    The channel order is that of a pixel shuffle whose result is cropped by one on each side: o, 1 - a, 1 - b.
    """
    rows = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], dtype=torch.float64)  # [1 - a, window, tap]
    phases = torch.einsum("aur,bvs,ocrs->oabcuv", rows, rows, weight.double())
    return phases.reshape(-1, weight.shape[1], 2, 2).to(weight.dtype)


def _rewrite(program: Program, node: fx.Node) -> None:
    graph, module = program.graph_module.graph, program.graph_module
    name = str(node.args[1].target)  # type: ignore[union-attr]
    set_constant(module, f"{name}_phases", phase_weights(get_constant(module, name)))
    bias = argument(node, 2, "bias")
    with graph.inserting_before(node):
        operands = [node.args[0].args[0], graph.get_attr(f"{name}_phases")]  # type: ignore[union-attr]
        if bias is not None:
            set_constant(module, f"{bias.target}_phases", get_constant(module, str(bias.target)).repeat_interleave(4))
            operands.append(graph.get_attr(f"{bias.target}_phases"))
        else:
            operands.append(None)
        windows = graph.call_function(aten.conv2d.default, (*operands, [1, 1], [1, 1], [1, 1], 1))
        pixels = graph.call_function(aten.pixel_shuffle.default, (windows, 2))
        result = graph.call_function(aten.constant_pad_nd.default, (pixels, [-1, -1, -1, -1]))
    for new in (windows, pixels, result):
        new.meta = {"scope": node.meta.get("scope", ())}
    node.replace_all_uses_with(result)
