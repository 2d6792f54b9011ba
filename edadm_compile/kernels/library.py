"""Launches that torch executes: operators without a kernel of ours, on views of the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edadm_compile.ir.ops import resolve
from edadm_compile.kernels import reference
from edadm_compile.kernels.launch import Launch
from edadm_compile.quant import packing

#: Element types by name.
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
        torch.int64, torch.bool,
    )
}  # fmt: skip
#: Largest magnitude below which float32 holds every integer.
_FLOAT32_EXACT = 1 << 24


def encode(value: Any, operands: dict[str, Any]) -> Any:
    """Arguments of an operator as plain values: operands become ``{"role": name}`` and are added to `operands`."""
    if isinstance(value, (list, tuple)):
        return [encode(v, operands) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if hasattr(value, "space"):
        role = f"in{len(operands)}"
        operands[role] = value
        return {"role": role}
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return None
    return value


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, (list, tuple)):
        return [decode(v, tensors) for v in value]
    if isinstance(value, dict) and "float" in value:
        return float(value["float"])
    if isinstance(value, dict):
        return tensors[value["role"]] if "role" in value else DTYPES[value["dtype"]]
    return value


def run(launch: Launch, tensors: Mapping[str, Tensor]) -> None:
    """Execute a library launch: inputs and output are views by role.

    The operator sees contiguous float32 or store-type inputs, as in the reference engine; the result is converted to
    the type of the output view.
    """
    name, args, kwargs = launch.call
    on_cpu = tensors["out"].device.type == "cpu"
    inputs = {k: v.contiguous() if on_cpu else v for k, v in tensors.items() if k != "out"}
    floats = {v.dtype for v in inputs.values() if v.dtype.is_floating_point}
    if len(floats) > 1:  # a library operator wants one floating type
        wide = max(floats, key=lambda d: d.itemsize)
        inputs = {k: v.to(wide) if v.dtype.is_floating_point else v for k, v in inputs.items()}
    function = _OVERRIDES.get(name) or resolve(name)
    result = function(*decode(args, inputs), **{k: decode(v, inputs) for k, v in kwargs.items()})
    if isinstance(result, (tuple, list)):
        result = result[int(launch.constants["result"])]
    tensors["out"].copy_(result)


def _qconv2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """Exact integer convolution in a floating type wide enough for every partial sum (grouped layers)."""
    sides = list(padding) if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]
    accumulators = []
    weight = packing.unpack(w_q, bits, shape)
    dtype = torch.float32 if 128 * 128 * math.prod(shape[1:]) < _FLOAT32_EXACT else torch.float64
    for term in reference.terms(x_q):
        padded = torch.nn.functional.pad(term.to(dtype), (sides[2], sides[3], sides[0], sides[1]), value=pad_value)
        acc = torch.nn.functional.conv2d(
            padded, weight.to(dtype), stride=list(stride), dilation=list(dilation), groups=groups
        )
        accumulators.append(acc.permute(0, 2, 3, 1))
    return reference.epilogue(accumulators, multiplier, bias).permute(0, 3, 1, 2)


def _qconv_transpose2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    """As a convolution over zero-inserted codes with the flipped kernel."""
    flipped = packing.pack(packing.unpack(w_q, bits, shape).flip(2, 3), bits)
    sides = reference.transposed_settings(shape[2:], stride, padding, output_padding, dilation)
    spread = reference.insert_zeros(x_q, stride, pad_value)
    return _qconv2d(spread, flipped, multiplier, bias, pad_value, (1, 1), sides, dilation, groups, bits, shape)


def _qlinear(x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    matrix = packing.unpack_matrix(w_q, bits, shape[1]).double()
    accumulators = [(term.double() @ matrix.T).to(torch.int32) for term in reference.terms(x_q)]
    return reference.epilogue(accumulators, multiplier, bias)


def _nearest(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Nearest upsampling of codes too, which torch has for floating types only (int8 is exact in float32)."""
    function = resolve("aten.upsample_nearest2d.vec")
    if x.dtype.is_floating_point:
        return function(x, *args, **kwargs)  # type: ignore[no-any-return]
    return function(x.float(), *args, **kwargs).to(x.dtype)  # type: ignore[no-any-return]


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "edadm.quantize.default": reference._quantize,
    "edadm.dequantize.default": reference._dequantize,
    "edadm.qconv2d.default": _qconv2d,
    "edadm.qconv_transpose2d.default": _qconv_transpose2d,
    "edadm.qlinear.default": _qlinear,
    "edadm.qmatmul.default": reference._qmatmul,
    "aten.upsample_nearest2d.vec": _nearest,
}
