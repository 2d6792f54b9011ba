"""The numeric contract, checked on a program: integer execution against simulated quantization.

Both sides get the same codes (those the simulation produced), so nothing but the layer itself is compared. The
independent side computes in float64, where all products and sums of codes are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import factor_after
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.kernels import reference
from edadm_compile.quant import packing

#: Half a unit in the last place of float32, relative.
_U = 2.0**-24


@dataclass(frozen=True)
class LayerReport:
    """Outcome for one layer.

    Attributes:
        layer: its name.
        accumulators: how many int32 accumulators were compared.
        accumulators_equal: whether all equal the exact sums of the simulation.
        error_over_bound: largest output error in units of the float32 rounding bound (at most 1).
        failure: sentence, or "" when the contract holds.
    """

    layer: str
    accumulators: int
    accumulators_equal: bool
    error_over_bound: float
    failure: str


class _Capture(fx.Interpreter):
    """Runs the simulated program and hands each integer layer's operands to a callback."""

    def __init__(self, program: Program, visit: Any) -> None:
        super().__init__(program.graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self._visit = visit

    def run_node(self, n: fx.Node) -> Any:
        info = layer_of(n)
        if info is not None and info.weight_bits < 32:
            pairs = [
                a for a in n.args[:2] if isinstance(a, fx.Node) and op_name(a.target) == "edadm.dequantize.default"
            ]
            codes = [self.env[pair.all_input_nodes[0]] for pair in pairs]
            self._visit(n, codes)
        return super().run_node(n)


def check_layers(qdq: Program, lowered: Program, inputs: Sequence[Tensor]) -> list[LayerReport]:
    """Check every integer layer of a lowered program on the codes its simulated twin sees for `inputs`."""
    twins = {info.name: n for n in lowered.graph_module.graph.nodes if (info := layer_of(n))}
    reports: list[LayerReport] = []

    def visit(node: fx.Node, codes: list[Tensor]) -> None:
        info = layer_of(node)
        assert info is not None
        twin = twins.get(info.name)
        if twin is None or not op_name(twin.target).startswith("edadm.q"):
            reports.append(LayerReport(info.name, 0, False, math.inf, "has no integer twin in the lowered program"))
        elif info.kind == "matmul":
            reports.append(_check_matmul(info.name, lowered, qdq, node, twin, codes))
        else:
            reports.append(_check_weighted(info.name, lowered, qdq, node, twin, codes[0]))

    with torch.no_grad():
        _Capture(qdq, visit).run(*qdq.graph_inputs(inputs))
    return reports


def _check_weighted(
    name: str, lowered: Program, qdq: Program, node: fx.Node, twin: fx.Node, x_q: Tensor
) -> LayerReport:
    module = lowered.graph_module
    kind = op_name(node.target)
    w_q, multiplier, bias = (get_constant(module, str(a.target)) for a in twin.args[1:4])  # type: ignore[union-attr]
    terms, result = _integer(kind, twin, x_q, w_q, multiplier, bias)
    scale, zero, w_scale, codes, axis, float_bias = _simulated_constants(qdq, node)
    centred = x_q.double() - zero
    weight = codes.transpose(0, 1) if axis == 1 else codes
    image = kind != "aten.linear.default"
    exact = _channels_last(_float64_layer(node, centred, weight), image)
    folded = zero * codes.reshape(codes.shape[0], -1).sum(dim=1)
    total = sum(t.double() * 256 ** (len(terms) - 1 - i) for i, t in enumerate(terms))
    assert isinstance(total, Tensor)
    equal = bool((exact == total - folded).all())
    truth = exact * (scale * w_scale) + float_bias
    bound = _rounding_bound(
        terms, multiplier.double().abs(), bias.double().abs(), truth.abs(), (truth - float_bias).abs()
    )
    ratio = float(((_channels_last(result, image).double() - truth).abs() / bound).max())
    failure = (
        ""
        if equal and ratio <= 1
        else ("int32 accumulators differ" if not equal else f"output error {ratio:.2f} times the rounding bound")
    )
    return LayerReport(name, total.numel(), equal, ratio, failure)


def _rounding_bound(terms: list[Tensor], multiplier: Tensor, bias: Tensor, truth: Tensor, product: Tensor) -> Tensor:
    """First-order float32 error of ``fl(fl(fl(acc) * m) + b')`` per element, all arguments absolute values in float64.

    Rounded are: m (its error scales the whole product), float(acc) above 2^24, acc * m, b' and the sum. A second term
    adds its own product and the intermediate sum.
    """
    bound = product + bias + truth
    for index, term in enumerate(terms):
        weight = 256.0 ** (len(terms) - 1 - index)
        bound = bound + 2 * term.double().abs() * weight * multiplier
    if len(terms) == 2:
        bound = bound + terms[1].double().abs() * multiplier + bias
    return _U * 1.01 * bound + 1e-30


def _channels_last(value: Tensor, image: bool) -> Tensor:
    """Images [B, C, H, W] to [B, H, W, C]; token tensors have their channels last already."""
    return value.permute(0, 2, 3, 1) if image else value


def _integer(
    kind: str, twin: fx.Node, x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor
) -> tuple[list[Tensor], Tensor]:
    """int32 accumulators (channels last) and the float32 result of the integer layer."""
    args: Any = twin.args
    result = twin.target(x_q, w_q, multiplier, bias, *args[4:])  # type: ignore[operator]
    if kind == "aten.linear.default":
        return reference.linear_accumulators(x_q, w_q, args[4], args[5]), result
    if kind == "aten.conv2d.default":
        pad, stride, padding, dilation, groups, bits, shape = args[4:]
        matrix = packing.unpack_matrix(w_q, bits, math.prod(shape[1:]))
        return reference.conv_accumulators(x_q, matrix, shape[2:], pad, stride, padding, dilation, groups), result
    return reference.transpose_accumulators(x_q, w_q, *args[4:]), result


def _simulated_constants(qdq: Program, node: fx.Node) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    module = qdq.graph_module

    def constant(value: Any) -> Tensor:
        return get_constant(module, str(value.target)).double()

    _codes, scale, zero = node.args[0].args  # type: ignore[union-attr]
    w_q, w_scale, bits, shape, axis = node.args[1].args  # type: ignore[union-attr]
    codes = packing.unpack(get_constant(module, str(w_q.target)), bits, shape).double()  # type: ignore
    bias = node.args[2] if len(node.args) > 2 else None
    float_bias = constant(bias) if isinstance(bias, fx.Node) else torch.zeros(1, dtype=torch.float64)
    return constant(scale), constant(zero), constant(w_scale), codes, int(axis), float_bias  # type: ignore


def _float64_layer(node: fx.Node, x: Tensor, weight: Tensor) -> Tensor:
    """The simulated layer on exact integers held in float64, without bias."""
    args = [x, weight, None, *node.args[3:]]
    return node.target(*args, **node.kwargs)  # type: ignore[operator, no-any-return]


def _check_matmul(
    name: str, lowered: Program, qdq: Program, node: fx.Node, twin: fx.Node, codes: list[Tensor]
) -> LayerReport:
    a, b = codes
    _, _, scale_node, zero_a, zero_b = twin.args
    acc = reference.matmul_accumulator(a, b, int(zero_a), int(zero_b))  # type: ignore[arg-type]
    scales = [get_constant(qdq.graph_module, str(arg.args[1].target)).double() for arg in node.args[:2]]  # type: ignore
    zeros = [get_constant(qdq.graph_module, str(arg.args[2].target)).double() for arg in node.args[:2]]  # type: ignore
    # Exact sum by a different route: the four terms of the product expanded.
    k = a.shape[-1]
    exact = (
        (a.double() @ b.double())
        - zeros[0] * b.double().sum(-2, keepdim=True)
        - zeros[1] * a.double().sum(-1, keepdim=True)
    )
    exact = exact + k * zeros[0] * zeros[1]
    factor, _ = factor_after(node)  # lowering folds the number that follows into the scale
    truth = exact * scales[0] * scales[1] * factor
    scale = get_constant(lowered.graph_module, str(scale_node.target))  # type: ignore[union-attr]
    result = twin.target(a, b, scale, zero_a, zero_b)  # type: ignore[operator]
    ratio = float(((result.double() - truth).abs() / (_U * (4 if factor == 1 else 6) * truth.abs() + 1e-30)).max())
    equal = bool((acc.double() == exact).all())
    failure = (
        ""
        if equal and ratio <= 1
        else ("int32 accumulators differ" if not equal else f"output error {ratio:.2f} times the rounding bound")
    )
    return LayerReport(name, acc.numel(), equal, ratio, failure)


def check_weights(qdq: Program, weights: dict[str, tuple[Tensor, int]]) -> dict[str, Any]:
    """Compare stored codes with the reference weights: every code is the floor or ceiling of w / s, or clipped.

    Args:
        weights: float weight (output channels first) and axis by layer name.
    """
    failures: dict[str, str] = {}
    checked = 0
    for node in qdq.graph_module.graph.nodes:
        info = layer_of(node)
        if info is None or not info.weight_shape or info.weight_bits == 32:
            continue
        w_q, w_scale, bits, shape, _axis = node.args[1].args
        if info.name not in weights:
            failures[info.name] = "the reference has no such layer"
            continue
        codes = packing.unpack(get_constant(qdq.graph_module, str(w_q.target)), bits, shape).double()
        scale = get_constant(qdq.graph_module, str(w_scale.target)).double()
        ideal = weights[info.name][0].double()
        if ideal.shape != codes.shape:
            failures[info.name] = f"shape {list(codes.shape)} against {list(ideal.shape)} in the reference"
            continue
        ideal = ideal / scale.reshape(-1, *[1] * (codes.dim() - 1))
        low, high = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        wrong = (codes - ideal.clamp(low, high)).abs() > 1 + 1e-5
        checked += 1
        if bool(wrong.any()):
            failures[info.name] = (
                f"{int(wrong.sum())} of {wrong.numel()} codes are more than one step from the reference"
            )
    return {"checked": checked - len([f for f in failures.values() if "codes" in f]), "failures": failures}
