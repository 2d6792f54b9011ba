"""Quantized convolutions and linear layers in the forms that ONNX Runtime runs in integers (docs/onnx.md).

direct    QLinearConv: codes in, codes out; four of them where it computes the phases of an upsampled image
gather    patches of codes, then QGemm: float out
scatter   MatMulIntegerToFloat per tap, then the sum of shifted results: float out, for few output channels
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators import phases
from edadm_compile.export.operators.codes import dequantized_terms, pad_codes, zero_code
from edadm_compile.export.operators.units import fine_units, output_channels, room_for_bias
from edadm_compile.export.prepare import is_integer_layer, weight_codes
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument, pair
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.output_codes import convolution_form
from edadm_compile.ir.program import layer_of
from edadm_compile.kernels.reference import transposed_settings
from edadm_compile.quant import packing


def quantized(base: Emitter, emit: Emitter) -> Emitter:
    """`emit` for integer layers, `base` for those that stay float."""
    return lambda s, node: emit(s, node) if is_integer_layer(node) else base(s, node)


def weight(
    s: Scope, name: str, codes: Tensor, scale: Tensor, bits: int, axis: int, factor: Tensor | None = None
) -> ir.Value:
    """DequantizeLinear of a constant weight with scales along `axis`.

    INT4 constants are widened by a Cast, which runs once when the model is loaded: the layer stays an integer layer.

    Args:
        factor: int32, broadcastable to `codes`; what codes are multiplied by (`units.fine_units`).
    """
    if s.int4 and packing.storage_bits(bits) == 4:
        packed = s.builder.packed_int4(codes, f"{name}.weight_q")
        if factor is not None:  # in int32: ONNX Runtime has no product of bytes
            wide = s.op("Cast", packed, to=ir.DataType.INT32)
            packed = s.op("Mul", wide, s.const(factor, torch.int32))
        stored = s.op("Cast", packed, to=ir.DataType.INT8, name=f"{name}.weight_int8")
    else:
        codes = codes if factor is None else (codes * factor).to(torch.int8)
        stored = s.builder.constant(codes, name=f"{name}.weight_q")
    scales = s.builder.constant(scale.float(), name=f"{name}.weight_scale")
    zero = s.const(torch.zeros(scale.numel(), dtype=torch.int8))
    return s.op("DequantizeLinear", stored, scales, zero, axis=axis, name=f"{name}.weight")


def _name(node: fx.Node) -> str:
    info = layer_of(node)
    assert info is not None
    return info.name


def _conv2d(s: Scope, node: fx.Node) -> Emitted:
    info = layer_of(node)
    assert info is not None
    form = "direct" if s.plain_layers else convolution_form(node, info)
    return {"direct": _direct, "gather": _gather, "scatter": _scatter}[form](s, node)


def _direct(s: Scope, node: fx.Node) -> Emitted:
    stride, padding, dilation = _geometry(node)
    pads = [padding[0], padding[1], padding[0], padding[1]]
    x = s.value(node.args[0])
    source = absorbed_padding(s, node)
    if source is not None:
        widths: Any = source.args[1]
        left, right, top, bottom = widths
        pads = [pads[0] + top, pads[1] + left, pads[2] + bottom, pads[3] + right]
        x = dequantized_terms(s, node.args[0], lambda s, codes, term: s.emitted[source.args[0]])[0]  # type: ignore
    codes, scale, bits = weight_codes(s.module, node)
    return _qlinear_conv(s, node, x, (codes, scale, bits), pads, stride, dilation, argument(node, 6, "groups", 1))


def _geometry(node: fx.Node) -> tuple[list[int], list[int], list[int]]:
    """(stride, padding, dilation), two each."""
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    stride, padding, dilation = (pair(argument(node, 3 + i, n, d)) for i, (n, d) in enumerate(names))
    return stride, padding, dilation


def absorbed_padding(s: Scope, node: fx.Node) -> fx.Node | None:
    """The padding of codes in front of a convolution in the direct form, which does it itself: both mean zero."""
    info = layer_of(node)
    if info is None or info.kind != "conv2d" or not (s.plain_layers or convolution_form(node, info) == "direct"):
        return None
    codes = node.args[0].args[0]  # type: ignore[union-attr]
    is_pad = isinstance(codes, fx.Node) and op_name(codes.target) == "aten.constant_pad_nd.default"
    return codes if is_pad else None  # type: ignore[return-value]


def _qlinear_conv(
    s: Scope, node: fx.Node, x: ir.Value, w: tuple[Tensor, Tensor, int], pads: list[int], stride: list[int],
    dilation: list[int], groups: int,
) -> Emitted:  # fmt: skip
    codes, scale, bits = w
    bias = s.constant_of(argument(node, 2, "bias"))
    x_scale = s.constant_of(node.args[0].args[1])  # type: ignore[union-attr]
    assert x_scale is not None
    scale, bias = output_channels(s, node, scale, bias)
    factor = None
    if bias is not None:
        factor, scale = fine_units(s, node, codes, scale)
        codes, scale = room_for_bias(codes, scale, bias, x_scale)

    def convolve(name: str, part: slice, pads: list[int]) -> ir.Value:
        by = () if factor is None else (factor[part],)
        inputs = [x, weight(s, name, codes[part].contiguous(), scale[part], bits, 0, *by)]
        if bias is not None:
            inputs.append(_bias(s, name, bias[part], x_scale * scale[part]))
        return s.op(
            "Conv", *inputs, pads=pads, strides=stride, dilations=dilation, group=groups,
            kernel_shape=list(codes.shape[2:]), name=name,
        )  # fmt: skip

    if phases.pixels_behind(node) is not None and not s.plain_layers:
        return phases.convolutions(lambda index, part, pads: convolve(f"{_name(node)}.phase{index}", part, pads))
    return convolve(_name(node), slice(None), pads)


def _bias(s: Scope, name: str, bias: Tensor, scale: Tensor) -> ir.Value:
    """int32 bias with scale ``s_x * s_w``, as integer kernels of ONNX Runtime want it; float for others."""
    if s.plain_layers:
        return s.builder.constant(bias.float(), name=f"{name}.bias")
    codes = torch.round(bias.double() / scale.double()).to(torch.int32)
    stored = s.builder.constant(codes, name=f"{name}.bias_q")
    scales = s.builder.constant(scale.float(), name=f"{name}.bias_scale")
    zero = s.const(torch.zeros(scale.numel(), dtype=torch.int32))
    return s.op("DequantizeLinear", stored, scales, zero, axis=0, name=f"{name}.bias")


def _gather(s: Scope, node: fx.Node) -> Emitted:
    """Rows of codes [B H' W', kh kw C] times [kh kw C, O], for each 8-bit term; patches are gathered channels last."""
    stride, padding, dilation = _geometry(node)
    codes, scale, bits = weight_codes(s.module, node)
    kernel, dims = list(codes.shape[2:]), s.dims(node)
    zero = zero_code(s, node.args[0])  # type: ignore[arg-type]

    def patches(s: Scope, source: fx.Node, term: ir.Value) -> ir.Value:
        term = s.op("Transpose", term, perm=[0, 2, 3, 1])
        if any(padding):
            term = s.op("Pad", term, s.const([0, padding[0], padding[1], 0, 0, padding[0], padding[1], 0]), zero)
        size = (dims[2].fixed, dims[3].fixed)
        taps = [
            _window(s, term, (r * dilation[0], q * dilation[1]), size, stride, first_axis=1)
            for r in range(kernel[0])
            for q in range(kernel[1])
        ]
        joined = taps[0] if len(taps) == 1 else s.op("Concat", *taps, axis=3)
        return s.op("Reshape", joined, s.const([-1, codes[0].numel()]))

    matrix = codes.permute(2, 3, 1, 0).reshape(-1, codes.shape[0]).contiguous()
    values = dequantized_terms(s, node.args[0], patches)  # type: ignore[arg-type]
    result = _products(s, node, values, matrix, scale, bits)
    rows = s.reshape(result, [dims[0], dims[2], dims[3], dims[1]])
    return s.op("Transpose", rows, perm=[0, 3, 1, 2], name=f"{_name(node)}.output")


def _window(
    s: Scope, value: ir.Value, start: tuple[int, int], size: tuple[int, int], stride: list[int],
    channels: tuple[int, int] | None = None, first_axis: int = 2,
) -> ir.Value:  # fmt: skip
    """Rows and columns from `start`, `stride` apart; optionally a range of channels (in front of them) too."""
    ends = [start[i] + (size[i] - 1) * stride[i] + 1 for i in range(2)]
    axes, first, last, step = [first_axis, first_axis + 1], list(start), ends, list(stride)
    if channels is not None:
        axes, first, last, step = [1, *axes], [channels[0], *first], [channels[1], *last], [1, *step]
    return s.op("Slice", value, s.const(first), s.const(last), s.const(axes), s.const(step))


def _products(s: Scope, node: fx.Node, values: list[ir.Value], matrix: Tensor, scale: Tensor, bits: int) -> ir.Value:
    """Sum of the products of each term [M, K] with one weight matrix [K, N], plus the bias; float32 [M, N].

    Gemm with an int32 bias and no quantizer behind becomes QGemm. A MatMul followed by an Add would not do: where the
    shape is known, ONNX Runtime makes a float Gemm of the two before it looks for integers.
    """
    name = _name(node)
    bias, x_scale = s.constant_of(argument(node, 2, "bias")), s.constant_of(node.args[0].args[1])  # type: ignore
    assert x_scale is not None
    if bias is not None:
        matrix, scale = (v.t() if v.dim() == 2 else v for v in room_for_bias(matrix.t(), scale, bias, x_scale))
    w = weight(s, name, matrix.contiguous(), scale, bits, 1)
    results = []
    for index, value in enumerate(values):
        last = index + 1 == len(values) and bias is not None
        added = (_bias(s, name, bias, x_scale * scale),) if last and bias is not None else ()
        results.append(s.op("Gemm", value, w, *added, name=name))
    return results[0] if len(results) == 1 else s.op("Add", *results, name=f"{name}.sum")


def _scatter(s: Scope, node: fx.Node) -> Emitted:
    """Products of every tap with the channels of a pixel, then ``y[p] = sum_r Z_r[p + r - padding]``."""
    _, padding, dilation = _geometry(node)
    codes, scale, bits = weight_codes(s.module, node)
    outer, inner, *kernel = codes.shape
    name, dims = _name(node), s.dims(node)
    height, width = (d.fixed for d in s.dims(node.args[0])[2:])  # type: ignore[arg-type]

    def pixels(s: Scope, source: fx.Node, term: ir.Value) -> ir.Value:
        return s.op("Transpose", s.op("Reshape", term, s.const([0, inner, -1])), perm=[0, 2, 1])

    matrix = codes.permute(1, 2, 3, 0).reshape(inner, -1).contiguous()  # [I, kh kw O]
    w = weight(s, name, matrix, scale.repeat(kernel[0] * kernel[1]), bits, 1)
    results = [s.op("MatMul", v, w, name=name) for v in dequantized_terms(s, node.args[0], pixels)]  # type: ignore[arg-type]
    total = results[0] if len(results) == 1 else s.op("Add", *results)
    planes = s.op("Reshape", s.op("Transpose", total, perm=[0, 2, 1]), s.const([0, matrix.shape[1], height, width]))
    if any(padding):
        planes = s.op("Pad", planes, s.const([0, 0, padding[0], padding[1], 0, 0, padding[0], padding[1]]))
    size = (dims[2].fixed, dims[3].fixed)
    taps = [(r, q) for r in range(kernel[0]) for q in range(kernel[1])]
    parts = [
        _window(s, planes, (r * dilation[0], q * dilation[1]), size, [1, 1], (i * outer, (i + 1) * outer))
        for i, (r, q) in enumerate(taps)
    ]
    bias = s.constant_of(argument(node, 2, "bias"))
    if bias is not None:
        parts.append(s.builder.constant(bias.reshape(1, -1, 1, 1), name=f"{name}.bias"))
    return parts[0] if len(parts) == 1 else s.op("Sum", *parts, name=f"{name}.output")


def _linear(s: Scope, node: fx.Node) -> Emitted:
    codes, scale, bits = weight_codes(s.module, node)

    def rows(s: Scope, source: fx.Node, term: ir.Value) -> ir.Value:
        return term if s.rank(source) == 2 else s.op("Reshape", term, s.const([-1, codes.shape[1]]))

    values = dequantized_terms(s, node.args[0], rows)  # type: ignore[arg-type]
    result = _products(s, node, values, codes.t(), scale, bits)
    dims = s.dims(node)
    return result if len(dims) == 2 else s.reshape(result, dims, name=f"{_name(node)}.output")


def _conv_transpose2d(s: Scope, node: fx.Node) -> Emitted:
    """Zeros between the codes, then a convolution with the flipped kernel."""
    names = (("stride", 1), ("padding", 0), ("output_padding", 0))
    stride, padding, extra = (pair(argument(node, 3 + i, n, d)) for i, (n, d) in enumerate(names))
    dilation = pair(argument(node, 7, "dilation", 1))
    codes, scale, bits = weight_codes(s.module, node)
    top, bottom, left, right = transposed_settings(codes.shape[2:], stride, padding, extra, dilation)
    if min(top, bottom, left, right) < 0:
        raise ExportError(f"a transposed convolution with padding {padding} beyond its kernel has no ONNX form here")
    dims = s.dims(node.args[0])  # type: ignore[arg-type]
    zero = zero_code(s, node.args[0])  # type: ignore[arg-type]

    def spread(s: Scope, source: fx.Node, term: ir.Value) -> ir.Value:
        b, c, h, w = dims
        split = s.reshape(term, [b, c, h, Dim(1), w, Dim(1)])
        pads = [0] * 9 + [stride[0] - 1, 0, stride[1] - 1]
        wide = [b, c, Dim(h.fixed * stride[0]), Dim(w.fixed * stride[1])]
        joined = s.reshape(s.op("Pad", split, s.const(pads), zero), wide)
        return _window(s, joined, (0, 0), ((h.fixed - 1) * stride[0] + 1, (w.fixed - 1) * stride[1] + 1), [1, 1])

    x = dequantized_terms(s, node.args[0], spread)  # type: ignore[arg-type]
    if len(x) > 1:
        raise ExportError("a transposed convolution with a 16-bit input has no integer ONNX form here")
    w = (codes.flip(2, 3).contiguous(), scale, bits)
    return _qlinear_conv(s, node, x[0], w, [top, left, bottom, right], [1, 1], dilation, 1)


def _dequantize_weight(s: Scope, node: fx.Node) -> Emitted:
    """The float weight of a layer whose input stays float; integer layers store theirs themselves and leave this unread."""
    layer = next(iter(node.users))
    if is_integer_layer(layer):
        return s.const(0.0)
    codes, scale, bits = weight_codes(s.module, layer)
    axis = int(node.args[4])  # type: ignore[arg-type]
    return weight(s, _name(layer), codes.transpose(0, axis).contiguous(), scale, bits, axis)


def _pad(base: Emitter) -> Emitter:
    def emit(s: Scope, node: fx.Node) -> Emitted:
        source: Any = node.args[0]
        return pad_codes(s, node) if s.dtype(source) == torch.int8 else base(s, node)

    return emit


def table(base: dict[str, Emitter]) -> dict[str, Emitter]:
    """Emitters of layers on top of those for float operators."""
    return {
        "aten.conv2d.default": quantized(base["aten.conv2d.default"], _conv2d),
        "aten.linear.default": quantized(base["aten.linear.default"], _linear),
        "aten.conv_transpose2d.input": quantized(base["aten.conv_transpose2d.input"], _conv_transpose2d),
        "aten.constant_pad_nd.default": phases.crop(_pad(base["aten.constant_pad_nd.default"])),
        "aten.pixel_shuffle.default": phases.pixel_shuffle(base["aten.pixel_shuffle.default"]),
        "edadm.dequantize_weight.default": _dequantize_weight,
    }
