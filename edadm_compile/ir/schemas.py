"""Schemas and shape functions of the ``edadm::`` operators.

Importing this module registers the schemas; `edadm_compile.kernels.reference` gives them their meaning on the CPU.
Common arguments: ``x_q`` are activation codes (int8, or int16 for 16 bits), ``w_q`` a packed weight
(`edadm_compile.quant.packing`), ``shape`` its logical shape, ``multiplier`` float32 [O] = s_x * s_w,
``bias`` float32 [O] with the zero-point term folded in, ``pad_value`` the code that means zero, ``padding`` [h, w] or
[top, bottom, left, right].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edadm_compile.quant.packing import packed_columns

LIBRARY = torch.library.Library("edadm", "DEF")

SCHEMAS = (
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int bits, bool symmetric) -> Tensor",
    "dequantize(Tensor x_q, Tensor scale, Tensor zero_point) -> Tensor",
    "dequantize_weight(Tensor w_q, Tensor scale, int bits, int[] shape, int axis) -> Tensor",
    "qconv2d(Tensor x_q, Tensor w_q, Tensor multiplier, Tensor bias, int pad_value, int[] stride, int[] padding, "
    "int[] dilation, int groups, int bits, int[] shape) -> Tensor",
    "qconv_transpose2d(Tensor x_q, Tensor w_q, Tensor multiplier, Tensor bias, int pad_value, int[] stride, "
    "int[] padding, int[] output_padding, int[] dilation, int groups, int bits, int[] shape) -> Tensor",
    "qlinear(Tensor x_q, Tensor w_q, Tensor multiplier, Tensor bias, int bits, int[] shape) -> Tensor",
    "qmatmul(Tensor a_q, Tensor b_q, Tensor scale, int zero_a, int zero_b) -> Tensor",
)
for _schema in SCHEMAS:
    LIBRARY.define(_schema)


@torch.library.register_fake("edadm::quantize", lib=LIBRARY)
def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int16 if bits == 16 else torch.int8)


@torch.library.register_fake("edadm::dequantize", lib=LIBRARY)
def _dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return x_q.new_empty(x_q.shape, dtype=torch.float32)


@torch.library.register_fake("edadm::dequantize_weight", lib=LIBRARY)
def _dequantize_weight(w_q: Tensor, scale: Tensor, bits: int, shape: Sequence[int], axis: int) -> Tensor:
    sizes = list(shape)
    if axis == 1:  # stored output channels first, returned the way a transposed convolution reads it
        sizes[0], sizes[1] = sizes[1], sizes[0]
    return scale.new_empty(sizes)


def _check_layer(channels: int, w_q: Tensor, multiplier: Tensor, bias: Tensor, bits: int, shape: Sequence[int]) -> None:
    """Refuse operands that do not belong together (a loaded program is checked this way before anything runs)."""
    stored = (shape[0], packed_columns(math.prod(shape[1:]), bits))
    # Not torch._check, which imports a computer algebra system.
    if channels != shape[1]:
        raise RuntimeError(f"{channels} input channels, the weight {list(shape)} takes {shape[1]}")
    if tuple(w_q.shape) != stored:
        raise RuntimeError(f"packed weight {list(w_q.shape)}, {list(shape)} takes {list(stored)}")
    if not multiplier.shape == bias.shape == (shape[0],):
        raise RuntimeError(f"multiplier and bias must be [{shape[0]}]")


@torch.library.register_fake("edadm::qconv2d", lib=LIBRARY)
def _qconv2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int, shape: Sequence[int],
) -> Tensor:  # fmt: skip
    _check_layer(x_q.shape[1] // groups, w_q, multiplier, bias, bits, shape)
    sides = (sum(padding[:2]), sum(padding[2:])) if len(padding) == 4 else (2 * padding[0], 2 * padding[1])
    size = [(x_q.shape[2 + i] + sides[i] - dilation[i] * (shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return multiplier.new_empty((x_q.shape[0], shape[0], *size))


@torch.library.register_fake("edadm::qconv_transpose2d", lib=LIBRARY)
def _qconv_transpose2d(
    x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, pad_value: int, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int, bits: int,
    shape: Sequence[int],
) -> Tensor:  # fmt: skip
    _check_layer(x_q.shape[1], w_q, multiplier, bias, bits, shape)
    size = [
        (x_q.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (shape[2 + i] - 1) + output_padding[i] + 1
        for i in range(2)
    ]
    return multiplier.new_empty((x_q.shape[0], shape[0], *size))


@torch.library.register_fake("edadm::qlinear", lib=LIBRARY)
def _qlinear(x_q: Tensor, w_q: Tensor, multiplier: Tensor, bias: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    _check_layer(x_q.shape[-1], w_q, multiplier, bias, bits, shape)
    return multiplier.new_empty((*x_q.shape[:-1], shape[0]))


@torch.library.register_fake("edadm::qmatmul", lib=LIBRARY)
def _qmatmul(a_q: Tensor, b_q: Tensor, scale: Tensor, zero_a: int, zero_b: int) -> Tensor:
    return scale.new_empty((*a_q.shape[:-1], b_q.shape[-1]))
