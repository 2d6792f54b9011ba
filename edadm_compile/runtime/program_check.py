"""What a loaded program may ask for, checked before anything of it runs.

Two passes. The first one reads the arguments of the integer operators and their constants: code widths, scales, zero
points, paddings. The second one propagates shapes with tensors that have no memory, at the smallest batch and one above,
and stops at the first value, workspace or list that is larger than `Limits` allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.analysis import constant_target
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.quant.packing import packed_columns, storage_bits
from edadm_compile.quant.spec import ACT_BITS, WEIGHT_BITS, act_spec
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.program_shapes import place, propagate

_CONV = ("edadm.qconv2d.default", "edadm.qconv_transpose2d.default")
_LAYERS = (*_CONV, "edadm.qlinear.default")


def check_program(program: Program, limits: Limits) -> None:
    """Refuse a program that could not run, or whose running would allocate absurdly.

    Raises:
        ArtifactError: naming the node.
    """
    for index, node in enumerate(program.graph_module.graph.nodes):
        if node.op == "call_function":
            _check_node(program, node, place(index, node))
    lowest, highest = program.signature.min_batch, program.signature.max_batch
    for batch in dict.fromkeys((lowest, min(lowest + 1, highest))):
        propagate(program, batch, limits)


def _check_node(program: Program, node: fx.Node, where: str) -> None:
    name = op_name(node.target)
    if node.kwargs and name.startswith("edadm."):
        raise ArtifactError(f"{where}: takes no keyword arguments")
    if name == "edadm.quantize.default":
        _check_quantizer(program, node, where)
    elif name == "edadm.dequantize_weight.default":
        _check_stored_weight(program, node, where)
    elif name in _LAYERS:
        _check_layer(program, node, where, name in _CONV)
    elif name == "edadm.qmatmul.default":
        scale = _constant(program, node.args[2], where, "scale")
        _need(bool(scale.isfinite().all()), where, "scale is not finite")
        _need(all(type(z) is int and -128 <= z <= 127 for z in node.args[3:5]), where, "zero points are no int8 codes")
    info = layer_of(node)
    if info is not None and info.weight_shape and (len(node.args) < 2 or not isinstance(node.args[1], fx.Node)):
        raise ArtifactError(f"{where}: layer {info.name!r} has no weight")


def _check_quantizer(program: Program, node: fx.Node, where: str) -> None:
    _, scale_node, zero_node, bits, symmetric = list[Any](node.args)
    _need(type(bits) is int and bits in ACT_BITS, where, f"width {bits!r}, allowed {ACT_BITS}")
    _need(type(symmetric) is bool, where, f"symmetric is {symmetric!r}")
    scale, zero = (_constant(program, n, where, "scale or zero point") for n in (scale_node, zero_node))
    spec = act_spec(bits, symmetric)
    _check_scale(scale, where)
    _need(
        zero.dtype == torch.float32 and zero.numel() in (1, scale.numel()), where, "zero points do not fit the scales"
    )
    whole = bool(((zero >= spec.qmin) & (zero <= spec.qmax) & (zero == zero.round())).all())
    _need(whole, where, f"a zero point is no code of {spec.qmin} to {spec.qmax}")


def _check_stored_weight(program: Program, node: fx.Node, where: str) -> None:
    packed, scale, bits, shape, axis = list[Any](node.args)
    _need(axis in (0, 1) and type(axis) is int, where, f"axis {axis!r}, allowed 0 and 1")
    _check_packed(_constant(program, packed, where, "weight"), bits, shape, where)
    values = _constant(program, scale, where, "scale")
    _check_scale(values, where)
    _need(tuple(values.shape) == (shape[0],), where, f"scales {list(values.shape)} for weights {list(shape)}")


def _check_layer(program: Program, node: fx.Node, where: str, conv: bool) -> None:
    args: list[Any] = list(node.args)
    bits, shape = args[-2:]
    _check_packed(_constant(program, args[1], where, "weight"), bits, shape, where)
    for argument, name in ((args[2], "multiplier"), (args[3], "bias")):
        value = _constant(program, argument, where, name)
        _need(value.dtype == torch.float32 and bool(value.isfinite().all()), where, f"{name} is not finite float32")
    if not conv:
        _need(len(shape) == 2, where, f"weight {shape!r} of a linear layer")
        return
    _need(len(shape) == 4, where, f"weight {shape!r} of a convolution")
    _need(type(args[4]) is int and -128 <= args[4] <= 127, where, f"pad code {args[4]!r} is no int8 code")
    stride, padding, *between, dilation, groups = args[5:-2]
    _check_window(stride, [padding, *between], dilation, where)
    whole = type(groups) is int and groups >= 1 and shape[0] % groups == 0
    _need(whole and (op_name(node.target) == _CONV[0] or groups == 1), where, f"{groups!r} groups")


def _check_window(stride: Any, paddings: Sequence[Any], dilation: Any, where: str) -> None:
    """Strides and dilations of at least 1, paddings of at least 0, two numbers each (a padding may have four)."""
    for name, value, least, lengths in (
        ("stride", stride, 1, (2,)),
        ("dilation", dilation, 1, (2,)),
        *(("padding", padding, 0, (2, 4)) for padding in paddings),
    ):
        sound = isinstance(value, (list, tuple)) and len(value) in lengths
        _need(sound and all(type(n) is int and least <= n <= 1 << 20 for n in value), where, f"{name} {value!r}")


def _check_packed(weight: Tensor, bits: Any, shape: Any, where: str) -> None:
    """A packed weight and what its layer says of it."""
    _need(type(bits) is int and bits in WEIGHT_BITS, where, f"width {bits!r}, allowed {WEIGHT_BITS}")
    counts = isinstance(shape, (list, tuple)) and len(shape) in (2, 4) and all(type(n) is int and n >= 1 for n in shape)
    _need(counts, where, f"weight shape {str(shape)[:80]}")
    stored = (shape[0], packed_columns(math.prod(shape[1:]), bits))
    kind = torch.uint8 if storage_bits(bits) == 4 else torch.int8
    _need(
        tuple(weight.shape) == stored and weight.dtype == kind,
        where,
        f"packed weight {list(weight.shape)} of {weight.dtype}, a {bits}-bit {list(shape)} is {list(stored)} of {kind}",
    )


def _check_scale(scale: Tensor, where: str) -> None:
    _need(scale.dtype == torch.float32 and scale.numel() >= 1, where, "scales are not float32")
    sound = bool((scale.isfinite() & (scale > 0)).all())
    _need(sound, where, "a scale is not a positive finite number")


def _constant(program: Program, node: Any, where: str, what: str) -> Tensor:
    target = constant_target(node)
    if target is None:
        raise ArtifactError(f"{where}: {what} is not a constant")
    return get_constant(program.graph_module, target)


def _need(holds: bool, where: str, message: str) -> None:
    if not holds:
        raise ArtifactError(f"{where}: {message}")
