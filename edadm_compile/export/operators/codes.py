"""Activation codes: ``edadm::quantize``, ``edadm::dequantize``, and what moves codes with a padding.

Codes are int8 in the program; in the ONNX graph they are uint8, 128 higher, unless the target or the node wants them
signed. 16-bit codes are a pair of 8-bit terms, ``256 * hi + lo``.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from edadm_compile.export.builder import DTYPES
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import layer_of
from edadm_compile.quant.spec import act_spec

#: Operators whose ONNX form reads each operand once.
_READ_ONCE = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "sub.Tensor", "mul.Tensor", "cat.default", "view.default", "reshape.default", "permute.default",
        "transpose.int", "group_norm.default", "constant_pad_nd.default",
    )
)  # fmt: skip


def code_type(s: Scope, node: fx.Node) -> torch.dtype:
    """Type of a node's codes in the ONNX graph."""
    return torch.int8 if s.signed or node.meta.get("signed") else torch.uint8


def offset(s: Scope, node: fx.Node) -> int:
    """What the ONNX codes are higher by than those of the program."""
    return 0 if code_type(s, node) == torch.int8 else 128


def affine(s: Scope, codes: fx.Node, scale: Tensor, zero: Tensor) -> tuple[ir.Value, ir.Value]:
    """Scale and zero point of ONNX codes: scalars, or one for each channel."""
    kind = code_type(s, codes)
    shape = () if scale.numel() == 1 else (-1,)
    shifted = (zero + offset(s, codes)).to(kind).reshape(shape)
    return s.const(scale.reshape(shape), torch.float32), s.const(shifted, kind)


def common_output(scale: Tensor) -> tuple[Tensor, Tensor]:
    """The one scale and zero point in which a convolution writes codes of a scale per channel.

    The channels' own scales and zero points are in its weights and bias then (`layers.output_channels`) and in the
    dequantizer behind.
    """
    return scale.median().reshape(()), torch.zeros(())


def _parameters(s: Scope, node: fx.Node) -> tuple[Tensor, Tensor]:
    scale, zero = (s.constant_of(a) for a in node.args[1:3])
    assert scale is not None and zero is not None
    return scale, zero


def _quantize(s: Scope, node: fx.Node) -> Emitted:
    """QuantizeLinear; codes of less than 8 bits are clipped to their range behind it."""
    bits, symmetric = int(node.args[3]), bool(node.args[4])  # type: ignore[arg-type]
    scale, zero = _parameters(s, node)
    if bits == 16:
        return _two_terms(s, node, scale)
    found = s.emitted[node.args[0]] if isinstance(node.args[0], fx.Node) else None
    if scale.numel() > 1:
        scale, zero = common_output(scale)
    parameters = affine(s, node, scale, zero)
    if isinstance(found, tuple):  # the phases of an image
        return tuple(s.op("QuantizeLinear", part, *parameters, name=node.name) for part in found)
    x = s.value(node.args[0], torch.float32)
    codes = s.op("QuantizeLinear", x, *parameters, name=node.name)
    if node.meta.get("signed") and not s.signed:
        # x86 sessions make uint8 of int8 codes that are dequantized at once, and two uint8 operands are slow.
        codes = s.reshape(codes, s.dims(node), s.dims(node))
    spec = act_spec(bits, symmetric)
    if (spec.qmin, spec.qmax) == (-128, 127):
        return codes
    kind = code_type(s, node)
    ends = (s.const(v + offset(s, node), kind) for v in (spec.qmin, spec.qmax))
    return s.op("Clip", codes, *ends, name=f"{node.name}.clip")


def _two_terms(s: Scope, node: fx.Node, scale: Tensor) -> tuple[ir.Value, ir.Value]:
    """Hi = floor((x_q + 128) / 256), lo = x_q - 256 hi, on whole numbers in float32, which holds them exactly."""
    spec = act_spec(16)
    x = s.value(node.args[0], torch.float32)
    rounded = s.op("Round", s.op("Div", x, s.const(scale.reshape(()), torch.float32)))
    whole = s.op("Clip", rounded, s.const(float(spec.qmin)), s.const(float(spec.qmax)))
    high = s.op("Floor", s.op("Mul", s.op("Add", whole, s.const(128.0)), s.const(1 / 256)))
    low = s.op("Sub", whole, s.op("Mul", high, s.const(256.0)))
    shift = float(offset(s, node))
    kind = DTYPES[code_type(s, node)]
    return tuple(
        s.op("Cast", s.op("Add", term, s.const(shift)), to=kind, name=f"{node.name}.{part}")
        for term, part in ((high, "hi"), (low, "lo"))
    )  # type: ignore[return-value]


def term_scales(scale: Tensor, terms: int) -> list[Tensor]:
    """Scales of the 8-bit terms of codes with one `scale`."""
    return [scale * 256, scale] if terms == 2 else [scale]


def dequantized_terms(s: Scope, node: fx.Node, move: Emitter | None = None) -> list[ir.Value]:
    """Float values of each 8-bit term behind an ``edadm::dequantize`` node.

    Args:
        move: rearranges codes first; called with the scope and a stand-in node whose emitted value is one term.
    """
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    scale, zero = _parameters(s, node)
    found = s.emitted[codes]
    terms = found if isinstance(found, tuple) else (found,)
    zeros = torch.zeros_like(zero) if len(terms) == 2 else zero
    results = []
    for term, term_scale in zip(terms, term_scales(scale, len(terms)), strict=True):
        moved = term if move is None else move(s, codes, term)  # type: ignore[call-arg]
        assert isinstance(moved, ir.Value)
        axis = 1 if scale.numel() > 1 else None
        results.append(s.op("DequantizeLinear", moved, *affine(s, codes, term_scale, zeros), axis=axis, name=node.name))
    return results


def _dequantize(s: Scope, node: fx.Node) -> Emitted:
    values = dequantized_terms(s, node)
    value = values[0] if len(values) == 1 else s.op("Add", *values)
    if any(layer_of(user) is not None for user in node.users):
        return value
    if len(node.users) == 1 and op_name(next(iter(node.users)).target) in _READ_ONCE:
        return value
    # ONNX Runtime makes a DequantizeLinear of its own for each reader, of which an activation function is two. Behind a
    # view, which costs nothing, there is one.
    return s.reshape(value, s.dims(node), s.dims(node))


def zero_code(s: Scope, node: fx.Node) -> ir.Value:
    """The code that means zero behind an ``edadm::dequantize`` node, a scalar."""
    codes = node.args[0]
    assert isinstance(codes, fx.Node)
    scale, zero = _parameters(s, node)
    if isinstance(s.emitted[codes], tuple):
        zero = torch.zeros_like(zero)
    return affine(s, codes, scale, zero)[1]


def pad_codes(s: Scope, node: fx.Node) -> Emitted:
    """``constant_pad_nd`` of codes: [left, right, top, bottom] with a code."""
    arguments: Any = node.args
    source, widths, code = arguments[:3]
    assert isinstance(source, fx.Node)
    left, right, top, bottom = widths
    pads = s.const([0, 0, top, left, 0, 0, bottom, right])
    found = s.emitted[source]
    assert isinstance(found, ir.Value)
    kind = code_type(s, source)
    return s.op("Pad", found, pads, s.const(int(code) + offset(s, source), kind), name=node.name)


TABLE: dict[str, Emitter] = {"edadm.quantize.default": _quantize, "edadm.dequantize.default": _dequantize}
