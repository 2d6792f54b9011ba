"""Device constants: how weights, vectors and codes of a program become what the kernels read.

A closed table of transforms (`ConstantSpec.transform`); each takes its source tensors on the target device and works
on whole tensors there. The file keeps the neutral layout of `edadm_compile.quant.packing`; this is the device layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edadm_compile.kernels.launch import ConstantSpec
from edadm_compile.kernels.registry import cdiv
from edadm_compile.quant import affine, packing


def interleave(codes: Tensor, block: int) -> Tensor:
    """int4 device layout: in each block of codes, byte j holds code j (low nibble) and code j + block / 2 (high).

    So the two nibbles of a tile multiply two contiguous halves of the activation tile.

    Args:
        codes: int8 [rows, K], K a multiple of `block`, each in [-8, 7].

    Returns:
        uint8 [rows, K / 2].
    """
    if codes.is_meta:  # for the shape alone, as `packing.unpack_matrix`
        return codes.view(torch.uint8).reshape(codes.shape[0], -1, 2, block // 2)[:, :, 0].reshape(codes.shape[0], -1)
    nibbles = (codes.view(torch.uint8) & 0xF).reshape(codes.shape[0], -1, 2, block // 2)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(codes.shape[0], -1)


def weight_codes(device_weight: Tensor, bits: int, block: int) -> Tensor:
    """Inverse of the device layout: int8 [rows, KH * KW * KC] codes."""
    if packing.storage_bits(bits) == 8:
        return device_weight
    blocks = device_weight.reshape(device_weight.shape[0], -1, block // 2)
    nibbles = torch.stack((blocks & 0xF, blocks >> 4), dim=2).reshape(device_weight.shape[0], -1)
    return (nibbles ^ 8).view(torch.int8) - 8  # sign-extend 4 bits


def pad_halves(rows: Tensor, multiple: int, glu: bool) -> Tensor:
    """Zero rows behind the last so that their number is a multiple; with `glu` behind each half."""
    halves = rows.chunk(2) if glu else (rows,)
    length = cdiv(halves[0].shape[0], multiple) * multiple
    padded = rows.new_zeros(len(halves), length, *rows.shape[1:])
    for target, half in zip(padded, halves, strict=True):
        target[: half.shape[0]] = half
    return padded.flatten(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` by copies: without memory (to learn the shape) that one imports torch's compiler, for a second."""
    if len(parts) == 1:
        return parts[0]
    result = parts[0].new_empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    for target, part in zip(result.split([part.shape[0] for part in parts]), parts, strict=True):
        target.copy_(part)
    return result


def weight(
    sources: Sequence[Tensor],
    device: torch.device,
    *,
    bits: int,
    shapes: Sequence[Sequence[int]],
    rows: int,
    channels: int,
    block: int,
    glu: bool = False,
) -> Tensor:
    """Weight matrix of qconv2d and qlinear.

    Args:
        sources: packed weights (`packing.pack`), stacked along the outputs.
        shapes: their logical shapes [O, C, kh, kw] or [O, C], equal but for O.
        rows: outputs are padded to a multiple of it (BLOCK_M), with `glu` each half of them.
        channels: KC, to which every tap's channels are padded; a multiple of `block`.
        block: BLOCK_K of the kernel; 8-bit codes lie in order whatever it is.

    Returns:
        int8 [O_pad, taps * KC], or for int4 uint8 of half the width (`interleave`).
    """
    taps = 1
    for size in shapes[0][2:]:
        taps *= size
    inner = shapes[0][1]
    parts = [packing.unpack_matrix(packed, bits, taps * inner) for packed in sources]
    codes = pad_halves(_joined(parts), rows, glu).reshape(-1, taps, inner)
    matrix = torch.nn.functional.pad(codes, (0, channels - inner)).reshape(codes.shape[0], -1)
    return interleave(matrix, block) if packing.storage_bits(bits) == 4 else matrix.contiguous()


def vector(
    sources: Sequence[Tensor], device: torch.device, *, length: int, glu: bool = False, factor: float = 1.0
) -> Tensor:
    """float32 vectors joined, times `factor`, padded with zeros to `length`; with `glu` each half of them is.

    Without a source: zeros.
    """
    count = 2 if glu else 1
    result = torch.zeros(count, length, device=device)
    if sources:
        joined = _joined([source.reshape(-1).float() for source in sources])
        joined = joined if factor == 1 else joined * factor
        for target, half in zip(result, joined.chunk(count), strict=True):
            target[: half.shape[0]] = half
    return result.reshape(-1)


def codes(sources: Sequence[Tensor], device: torch.device, *, value: int, length: int) -> Tensor:
    """int8 [length] of one code; no source."""
    return torch.full((length,), value, dtype=torch.int8, device=device)


def post(sources: Sequence[Tensor], device: torch.device) -> Tensor:
    """float32 [3] = (scale, zero point, 1 / scale) from (scale, zero point)."""
    scale, zero = (source.reshape(()).float() for source in sources)
    return torch.stack((scale, zero, 1 / scale))


def cast(sources: Sequence[Tensor], device: torch.device, *, dtype: torch.dtype | str) -> Tensor:
    """The source in another element type (or its name: "float16"), contiguous."""
    (source,) = sources
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return source.to(kind).contiguous()


def dequantized_weight(
    sources: Sequence[Tensor],
    device: torch.device,
    *,
    bits: int,
    shape: Sequence[int],
    dtype: torch.dtype | str,
    axis: int = 0,
) -> Tensor:
    """Float weight of a layer that a library computes.

    Args:
        sources: packed weight, float32 scale [shape[0]].
        shape: logical shape of the packed weight, outputs first.
        axis: 1 moves the outputs behind the inputs (transposed convolution).
    """
    packed, scale = sources
    values = packing.unpack(packed, bits, shape).float()
    values *= affine.per_channel(scale.float(), values.dim(), 0)
    return cast([values.transpose(0, axis)], device, dtype=dtype)


def float_weight(
    sources: Sequence[Tensor], device: torch.device, *, bits: int, shape: Sequence[int], dtype: torch.dtype | str
) -> Tensor:
    """Weight of an integer layer that a plan leaves in float: codes * multiplier / activation scale.

    Args:
        sources: packed weight, multiplier [shape[0]] = s_x * s_w, s_x.
    """
    packed, multiplier, scale = sources
    values = packing.unpack(packed, bits, shape).float()
    values *= affine.per_channel(multiplier.float() / scale.float().reshape(()), values.dim(), 0)
    return cast([values], device, dtype=dtype)


def float_bias(
    sources: Sequence[Tensor], device: torch.device, *, bits: int, shape: Sequence[int], dtype: torch.dtype | str
) -> Tensor:
    """Bias of the same layer, without the zero-point term that its integer form holds.

    Args:
        sources: packed weight, multiplier, bias of the integer layer, zero point of the activations.
    """
    packed, multiplier, bias, zero = sources
    sums = packing.unpack(packed, bits, shape).flatten(1).sum(dim=1, dtype=torch.int32).double()
    return cast([bias.double() + multiplier.double() * zero.double().reshape(()) * sums], device, dtype=dtype)


def attention(sources: Sequence[Tensor], device: torch.device, *, zero_q: int, zero_k: int, zero_v: int) -> Tensor:
    """float32 [7] parameters of the attention kernel from (scale of the scores, s_v, s_p, zero_p)."""
    scores, s_v, s_p, zero_p = (source.reshape(()).float() for source in sources)
    zeros = torch.tensor([zero_q, zero_k, zero_v], dtype=torch.float32, device=device)
    return torch.stack((scores, zeros[0], zeros[1], s_v, zeros[2], s_p, zero_p))


#: Every transform by name.
TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "weight": weight,
    "vector": vector,
    "codes": codes,
    "post": post,
    "cast": cast,
    "dequantized_weight": dequantized_weight,
    "attention": attention,
    "float_weight": float_weight,
    "float_bias": float_bias,
}

#: Those that read single numbers and return a few.
SCALARS = ("post", "attention")


def make(spec: ConstantSpec, tensors: Callable[[str], Tensor], device: torch.device | str) -> Tensor:
    """The device constant that `spec` describes.

    Args:
        tensors: a program's tensor by name.

    Raises:
        KeyError: no such transform.
    """
    target = torch.device(device)
    transform = TRANSFORMS[spec.transform]
    return transform([tensors(name).to(target) for name in spec.source], target, **spec.arguments)
