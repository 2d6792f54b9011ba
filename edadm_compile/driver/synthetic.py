"""Plans of one launch made from sizes alone, with random weights: what benchmarks and ceilings run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels.launch import Launch, LaunchPlan, Operand, Tile
from edadm_compile.kernels.tiles import is_asynchronous, stored_rows
from edadm_compile.lowering import arena
from edadm_compile.lowering.builder import Builder, Target
from edadm_compile.lowering.layout import ROW_ALIGNMENT, channels_last, contiguous, round_up
from edadm_compile.quant import packing
from edadm_compile.quant.spec import weight_spec

#: What kernels may read behind the last element of an input, in bytes.
_SLACK = 512


@dataclass(frozen=True)
class Synthetic:
    """A plan of one launch and the tensors its constants are made of.

    Attributes:
        plan: what runs.
        tensors: by name, on the CPU.
    """

    plan: LaunchPlan
    tensors: Mapping[str, Tensor]

    @property
    def launch(self) -> Launch:
        """The launch."""
        return self.plan.launches[0]


@dataclass(frozen=True)
class Settings:
    """What all synthetic plans share.

    Attributes:
        arch: "sm_90" and so on; "" for the CPU.
        batch: images.
        small: codes and scales for which float16 holds every accumulator: checks instead of times.
        tiles: tiles by key, before the built-in choice.
        seed: of weights.
        outputs: "both" (float16 and codes), or "out_q" (codes alone).
    """

    arch: str
    batch: int = 1
    small: bool = False
    tiles: Mapping[str, Tile] | None = None
    seed: int = 0
    outputs: str = "both"

    def builder(self) -> Builder:
        """An empty plan."""
        return Builder(Target(self.arch, self.batch, torch.float16, tiles=self.tiles or {}))

    def weights(self, shape: tuple[int, ...], bits: int) -> dict[str, Tensor]:
        """Packed random codes of `shape`, multipliers and biases [O], and a quantizer with a power of two as its scale."""
        return _weights(shape, bits, self.small, self.seed)


@lru_cache(maxsize=8)  # the candidates of a shape differ in their tiles alone
def _weights(shape: tuple[int, ...], bits: int, small: bool, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spec = weight_spec(bits)
    low, high = (-2, 2) if small else (spec.qmin, spec.qmax)
    codes = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
    outputs = shape[0]
    ones = torch.ones(outputs)
    multiplier = ones if small else torch.rand(outputs, generator=generator) * 2e-4
    bias = torch.zeros(outputs) if small else torch.randn(outputs, generator=generator)
    return {
        "w": packing.pack(codes, packing.storage_bits(bits)), "multiplier": multiplier, "bias": bias,
        "scale": torch.tensor(0.25 if not small else 4.0), "zero": torch.tensor(-7.0),
    }  # fmt: skip


def _input(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, name: str) -> Operand:
    return Operand("input", name, dtype, shape, strides)


def _plan(build: Builder, inputs: Mapping[str, Operand]) -> LaunchPlan:
    buffers, size = arena.plan(arena.lifetimes(build.launches, build.sizes, build.names, 0))
    flat = {name: ((o.span + _SLACK) // o.dtype.itemsize,) for name, o in inputs.items()}
    return LaunchPlan(
        build.target.arch, build.target.batch, build.target.store, tuple(build.launches), buffers, size,
        build.constants, build.counters, {name: (flat[name], o.dtype) for name, o in inputs.items()}, (1,),
    )  # fmt: skip


def _matrix(
    settings: Settings,
    kernel: str,
    x: Operand,
    shape: tuple[int, ...],
    bits: int,
    constants: dict[str, Any],
    count: int,
) -> Synthetic:
    """A convolution or linear layer that writes float16 and codes.

    Args:
        x: the codes.
        shape: of the weight, outputs first.
        count: pixels or rows.
    """
    build, outputs = settings.builder(), shape[0]
    stored = packing.storage_bits(bits)
    constants |= {
        "C": shape[1], "O": outputs, "BITS": stored, "ASM": bool(settings.arch), "OUT_STRIDE": outputs, "OUT_Q": True,
        "OUT": settings.outputs == "both", "OUT_Q_STRIDE": round_up(outputs, ROW_ALIGNMENT),
    }  # fmt: skip
    scalars = {"pixels" if kernel == "qconv2d" else "rows": count}
    tile = build.tile(kernel, {**constants, **scalars})
    block_m, block_n, block_k, split = (tile.sizes[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K"))
    rows, depth, taps = stored_rows(outputs), round_up(shape[1], block_k), shape[2] * shape[3] if shape[2:] else 1
    constants["KC"] = depth
    width, element = (taps * depth // 2, torch.uint8) if stored == 4 else (taps * depth, torch.int8)
    arguments = {"bits": stored, "shapes": [list(shape)], "rows": rows, "channels": depth, "block": block_k}
    operands = {"x": x, "w": build.constant(("w",), "weight", (rows, width), element, **arguments)}
    for role in ("multiplier", "bias"):
        operands[role] = build.constant((role,), "vector", (rows,), torch.float32, length=rows)
    if kernel == "qconv2d":
        operands["pad"] = build.constant((), "codes", (depth,), torch.int8, value=0, length=depth)
    operands["post"] = build.constant(("scale", "zero"), "post", (3,), torch.float32)
    writes: tuple[str, ...] = ("out_q",)
    if settings.outputs == "both":
        operands["out"] = build.buffer((count, outputs), torch.float16, "out")
        writes = ("out", *writes)
    codes = (constants["OUT_Q_STRIDE"], 1)
    operands["out_q"] = build.buffer((count, outputs), torch.int8, "out_q", codes)
    if split > 1:
        tall, wide = round_up(outputs, block_m), round_up(count, block_n)
        operands["partial"] = build.buffer((split, 1, tall, wide), torch.int32, "partial")
        build.counters = (tall // block_m) * (wide // block_n)
        operands["counter"] = Operand("counter", 0, torch.int32, (build.counters,), (1,))
        writes = (*writes, "partial", "counter")
    if is_asynchronous(tile):
        kernel = f"{kernel}_sm90"
    build.launch(Launch(kernel, kernel, operands, constants, scalars, tile, writes))
    return Synthetic(_plan(build, {"x": x}), settings.weights(shape, bits))


def convolution(
    settings: Settings, channels: int, outputs: int, size: tuple[int, int], kernel: int, stride: int = 1,
    upsample: int = 1, bits: int = 8,
) -> Synthetic:  # fmt: skip
    """A convolution of [B, C, H, W] codes with "same" padding.

    Args:
        size: H and W in memory, before upsampling.
    """
    pitch, pad = round_up(channels, ROW_ALIGNMENT), kernel // 2
    shape = (settings.batch, channels, *size)
    x = _input(shape, channels_last(shape, pitch), torch.int8, "x")
    out = [(n * upsample + 2 * pad - kernel) // stride + 1 for n in size]
    constants = {
        "X_STRIDE": pitch, "H": size[0], "W": size[1], "KH": kernel, "KW": kernel, "STRIDE_H": stride,
        "STRIDE_W": stride, "PAD_T": pad, "PAD_L": pad, "UPSAMPLE": upsample, "OH": out[0], "OW": out[1],
    }  # fmt: skip
    weight = (outputs, channels, kernel, kernel)
    return _matrix(settings, "qconv2d", x, weight, bits, constants, settings.batch * out[0] * out[1])


def linear(settings: Settings, rows: int, channels: int, outputs: int, bits: int = 8) -> Synthetic:
    """A linear layer on [batch * rows, C] codes."""
    pitch, count = round_up(channels, ROW_ALIGNMENT), settings.batch * rows
    x = _input((count, channels), (pitch, 1), torch.int8, "x")
    return _matrix(settings, "qlinear", x, (outputs, channels), bits, {"X_STRIDE": pitch}, count)


def group_norm(settings: Settings, channels: int, pixels: int, groups: int = 32, parts: int = 0) -> Synthetic:
    """Group norm, SiLU and quantization of float16 [B, HW, C].

    Args:
        parts: statistics come with the input, float32 [B, parts, 2, C], as large maps have them; 0: the launch computes
            them.
    """
    build, shape = settings.builder(), (settings.batch, pixels, channels)
    x = _input(shape, contiguous(shape), torch.float16, "x")
    pitch = round_up(channels, ROW_ALIGNMENT)
    constants: dict[str, Any] = {
        "HW": pixels, "C": channels, "X_STRIDE": channels, "GROUPS": groups, "EPS": 1e-5, "ACT": 1,
        "OUT": settings.outputs == "both", "OUT_STRIDE": channels, "OUT_Q": True, "OUT_Q_STRIDE": pitch, "ASM": bool(settings.arch),
    }  # fmt: skip
    scalars = {"batch": settings.batch}
    inputs = {"x": x}
    if parts:
        statistics = (settings.batch, parts, 2, channels)
        inputs["stats"] = _input(statistics, contiguous(statistics), torch.float32, "stats")
        constants["T"] = parts
    operands = {
        **inputs,
        "weight": build.parameter("weight", (channels,), torch.float32),
        "bias": build.parameter("bias", (channels,), torch.float32),
        "post": build.constant(("scale", "zero"), "post", (3,), torch.float32),
        "out_q": build.buffer(shape, torch.int8, "out_q", (pixels * pitch, pitch, 1)),
    }
    writes: tuple[str, ...] = ("out_q",)
    if settings.outputs == "both":
        operands["out"] = build.buffer(shape, torch.float16, "out")
        writes = ("out", *writes)
    tile = build.tile("groupnorm", {**constants, **scalars})
    build.launch(Launch("groupnorm", "groupnorm", operands, constants, scalars, tile, writes))
    generator = torch.Generator().manual_seed(settings.seed)
    tensors = {
        "weight": 1 + 0.1 * torch.randn(channels, generator=generator),
        "bias": 0.1 * torch.randn(channels, generator=generator),
        "scale": torch.tensor(1 / 32), "zero": torch.tensor(-100.0),
    }  # fmt: skip
    return Synthetic(_plan(build, inputs), tensors)


def attention(settings: Settings, queries: int, keys: int, heads: int, size: int) -> Synthetic:
    """softmax(q kᵀ / sqrt(D)) v on float16 [B, L, HEADS, D]."""
    build = settings.builder()
    constants: dict[str, Any] = {"LQ": queries, "LK": keys, "HEADS": heads, "D": size, "SCALE": size**-0.5}
    inputs = {}
    for role, length in (("q", queries), ("k", keys), ("v", keys)):
        shape = (settings.batch, length, heads, size)
        inputs[role] = _input(shape, contiguous(shape), torch.float16, role)
        strides = zip(("BATCH", "ROW", "HEAD"), contiguous(shape), strict=False)
        constants |= {f"{role.upper()}_{name}": stride for name, stride in strides}
    constants |= {"OUT_STRIDE": heads * size, "ASM": bool(settings.arch)}
    scalars = {"batch": settings.batch}
    out = build.buffer((settings.batch, queries, heads * size), torch.float16, "out")
    tile = build.tile("attention_float", {**constants, **scalars})
    launch = Launch("attention_float", "attention_float", {**inputs, "out": out}, constants, scalars, tile)
    build.launch(launch)
    return Synthetic(_plan(build, inputs), {})
