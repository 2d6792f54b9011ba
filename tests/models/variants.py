"""Small UNets with one trap each, in the forms that public diffusion code uses.

`VARIANTS` maps a name in words to a factory. All take x [B, 3, 8, 8] and t [B] and share a shell (time embedding, stem,
body, head), so that what differs is the trap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, WIDTH, TIME = 8, 8, 8


class Shell(nn.Module):
    """Time embedding (also added after the stem), stem, a body called with (h, emb), head."""

    out_channels = 3

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.in_channels, self.image_size = 3, SIZE
        self.time = nn.Sequential(nn.Linear(TIME, 2 * TIME), nn.SiLU(), nn.Linear(2 * TIME, TIME))
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = body
        self.head = nn.Conv2d(WIDTH, self.out_channels, 3, padding=1)

    def embed(self, t: Tensor) -> Tensor:
        half = TIME // 2
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies[None]
        return self.time(torch.cat((angles.cos(), angles.sin()), dim=-1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.embed(t)
        return self.head(F.silu(self.body(self.stem(x) + emb[:, :, None, None], emb)))


class BatchNormBody(nn.Module):
    """conv -> BatchNorm2d -> act, with running statistics that matter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)
        self.lin = nn.Linear(TIME, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + F.relu(self.norm(self.conv(h)) + self.lin(emb)[:, :, None, None])


class CheckpointFunction(torch.autograd.Function):
    """OpenAI's and CompVis' own gradient checkpointing."""

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], length: int, *args: Tensor) -> Any:
        ctx.run_function = run_function
        ctx.input_tensors = list(args[:length])
        ctx.input_params = list(args[length:])
        with torch.no_grad():
            return ctx.run_function(*ctx.input_tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def checkpoint(func: Callable[..., Any], inputs: tuple[Tensor, ...], params: Any, flag: bool) -> Any:
    if flag:
        return CheckpointFunction.apply(func, len(inputs), *inputs, *tuple(params))
    return func(*inputs)


class OpenAIAttention(nn.Module):
    """GroupNorm32, Conv1d qkv, einsum attention, behind the home-made checkpoint."""

    def __init__(self, use_checkpoint: bool = True, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.use_checkpoint = heads, use_checkpoint
        self.norm = nn.GroupNorm(4, WIDTH)
        self.qkv = nn.Conv1d(WIDTH, 3 * WIDTH, 1)
        self.proj_out = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (h,), self.parameters(), self.use_checkpoint)

    def _forward(self, h: Tensor) -> Tensor:
        b, c, *spatial = h.shape
        h = h.reshape(b, c, -1)
        qkv = self.qkv(self.norm(h.float()).type(h.dtype)).reshape(b * self.heads, -1, h.shape[-1])
        channels = qkv.shape[1] // 3
        scale = 1 / math.sqrt(math.sqrt(channels))
        q, k, v = torch.split(qkv, channels, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale).float(), dim=-1).type(qkv.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(b, -1, h.shape[-1])
        return (h + self.proj_out(a)).reshape(b, c, *spatial)


class TorchCheckpoint(nn.Module):
    """torch.utils.checkpoint around a residual block."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner = nn.Sequential(nn.GroupNorm(4, WIDTH), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + torch.utils.checkpoint.checkpoint(self.inner, h, use_reentrant=self.reentrant)


class DdimAttention(nn.Module):
    """bmm attention with 1x1 convolutions and GroupNorm, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        n = self.norm(h)
        b, c, height, width = n.shape
        q = self.q(n).reshape(b, c, height * width).permute(0, 2, 1)
        k = self.k(n).reshape(b, c, height * width)
        w = F.softmax(torch.bmm(q, k) * (int(c) ** (-0.5)), dim=2).permute(0, 2, 1)
        v = self.v(n).reshape(b, c, height * width)
        return h + self.proj(torch.bmm(v, w).reshape(b, c, height, width))


class ScaleShift(nn.Module):
    """FiLM conditioning: chunk of one projection, 1 + scale; the time path's output is not added but multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.proj = nn.Linear(TIME, 2 * WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        return h + self.conv(F.silu(self.norm(h) * (1 + scale) + shift))


class AsymmetricDown(nn.Module):
    """F.pad (0, 1, 0, 1) and a strided convolution without padding, nearest upsampling, concatenated skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(WIDTH, 12, 3, stride=2)
        self.up = nn.Conv2d(12, WIDTH, 3, padding=1)
        self.merge = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        d = F.silu(self.down(F.pad(h, (0, 1, 0, 1))))
        u = self.up(F.interpolate(d, scale_factor=2.0, mode="nearest"))
        return self.merge(torch.cat([u, h], dim=1))


class TokenLinear(nn.Module):
    """A transformer block on [B, N, C] tokens with scaled_dot_product_attention and a GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)
        self.ff_in, self.ff_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        b, c, height, width = h.shape
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.to_qkv(self.norm_a(tokens)).reshape(b, -1, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        tokens = tokens + self.to_out(a)
        value, gate = self.ff_in(self.norm_b(tokens)).chunk(2, dim=-1)
        tokens = tokens + self.ff_out(value * F.gelu(gate))
        return tokens.transpose(1, 2).reshape(b, c, height, width)


class MaskedAttention(nn.Module):
    """Attention with a constant mask that holds -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.full((SIZE * SIZE, SIZE * SIZE), float("-inf")).triu(1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        scores = (q @ k.transpose(1, 2)).masked_fill(self.mask != 0, float("-inf"))
        return h + self.out(a + scores.softmax(-1) @ v).transpose(1, 2).reshape(h.shape)


class FlatTokens(nn.Module):
    """Tokens flattened over the batch, [B * N, C], through addmm, as in hand-written kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        b, c, height, width = h.shape
        rows = h.permute(0, 2, 3, 1).reshape(-1, c)
        rows = torch.addmm(self.a.bias, rows, self.a.weight.t())
        rows = torch.addmm(self.b.bias, F.gelu(rows), self.b.weight.t())
        return h + rows.reshape(b, height, width, c).permute(0, 3, 1, 2)


class FlatNoResidual(nn.Module):
    """A chain of linears on [B * N, C] whose layers end outside any residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        b, c, height, width = h.shape
        rows = F.relu(self.a(h.permute(0, 2, 3, 1).reshape(-1, c)))
        rows = self.c(F.relu(self.b(rows)))
        return rows.reshape(b, height, width, c).permute(0, 3, 1, 2)


class SequenceFirst(nn.Module):
    """nn.MultiheadAttention in its default layout [N, B, C]: one packed projection, the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.ff = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        tokens = h.flatten(2).permute(2, 0, 1)
        n = self.norm(tokens)
        tokens = tokens + self.attention(n, n, n, need_weights=False)[0]
        return self.ff(tokens).permute(1, 2, 0).reshape(h.shape)


class MatmulParameter(nn.Module):
    """Bare parameters: x @ W, W @ x, F.linear with a raw tensor, addmm with beta."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.left = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.raw_bias = nn.Parameter(torch.randn(WIDTH))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        tokens = torch.matmul(self.left, h.flatten(2))  # [B, C, N]
        tokens = tokens.transpose(1, 2) @ self.right
        tokens = F.relu(F.linear(tokens, self.raw, self.raw_bias))
        flat = torch.addmm(self.raw_bias, tokens.reshape(-1, WIDTH), self.raw, beta=0.5)
        return h + flat.reshape(tokens.shape).transpose(1, 2).reshape(h.shape)


class EinsumLinear(nn.Module):
    """score_sde's NIN: a 1x1 convolution spelled as einsum with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, 12) / 3)
        self.v = nn.Parameter(torch.randn(WIDTH, 12) / 3)
        self.b = nn.Parameter(torch.zeros(12))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = torch.einsum("abcd,de->abce", h.permute(0, 2, 3, 1), self.w) + self.b
        return h + torch.einsum("oc,bhwc->bohw", self.v, F.silu(y))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation: the weight is computed on every call."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean(dim=(1, 2, 3), keepdim=True)) / (
            w.var(dim=(1, 2, 3), keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WeightStandardised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardisedConv(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.GroupNorm(4, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + F.silu(self.norm(self.conv(h)))


class Parametrised(nn.Module):
    """weight_norm (two tensors make one weight) and a low-rank update of a frozen convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
        self.base = nn.Conv2d(WIDTH, WIDTH, 1)
        self.lora_down, self.lora_up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2) / 4)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        update = (self.lora_up @ self.lora_down)[:, :, None, None]
        return h + F.conv2d(F.silu(self.normed(h)), self.base.weight + update, self.base.bias)


class Grouped(nn.Module):
    """Grouped, depthwise and dilated convolutions, and transposed ones with groups (no integer lowering)."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 5, padding=2, groups=WIDTH)
        self.pointwise = nn.Conv2d(WIDTH, 12, 1)
        self.grouped = nn.Conv2d(12, WIDTH, 3, padding=2, dilation=2, groups=4)
        self.down = nn.Conv2d(WIDTH, WIDTH, 2, stride=2)
        self.up = nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2, groups=2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = h + self.grouped(F.gelu(self.pointwise(self.depthwise(h))))
        return h + self.up(F.relu(self.down(h)))


class Reuse(nn.Module):
    """One convolution called twice on different values, a tied one, and one whose input channels are split twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.tied = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.tied.weight = self.shared.weight
        self.merge = nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        a = F.relu(self.shared(h))
        b = F.relu(self.shared(10 * a))
        c = self.tied(0.1 * b)
        return self.merge(torch.cat([a, b], dim=1)) + self.merge(torch.cat([c, 5 * h], dim=1))


class SharedWithNorms(nn.Module):
    """One convolution without bias called twice, each call with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        for norm in (self.norm_a, self.norm_b):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.norm_b(self.conv(F.relu(self.norm_a(self.conv(h)))))


class ComputedWeights(nn.Module):
    """A bias and a weight computed from the sample (a hypernetwork): no integer form, they stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, 1, 1) / 3)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        gain = torch.tanh(h.mean())
        y = F.conv2d(h, self.weight, bias=gain * torch.ones(WIDTH))
        return y + F.conv2d(self.conv(h), self.weight * (1 + gain))


class Padded(nn.Module):
    """Circular, reflecting, "same" (even and odd kernel) and per-axis padding; a strided rectangular kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.circular = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="circular")
        self.reflect = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(WIDTH, WIDTH, 3, padding="same")
        self.even = nn.Conv2d(WIDTH, WIDTH, 2, padding="same")
        self.flat = nn.Conv2d(WIDTH, WIDTH, (1, 3), padding=(0, 1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = h + self.same(F.silu(self.circular(h)))
        return h + self.flat(self.even(F.elu(self.reflect(h))))


class AdditiveSkips(nn.Module):
    """Two resolutions, skips added instead of concatenated, average pooling and bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        skip = F.hardswish(self.a(h))
        low = F.softplus(self.b(F.avg_pool2d(skip, 2)))
        return self.c(F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)) + skip


class PixelShuffle(nn.Module):
    """pixel_unshuffle down, pixel_shuffle up."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(4 * WIDTH, WIDTH, 3, padding=1)
        self.expand = nn.Conv2d(WIDTH, 4 * WIDTH, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        low = F.prelu(self.low(F.pixel_unshuffle(h, 2)), torch.tensor([0.2]))
        return h + F.pixel_shuffle(self.expand(low), 2)


class UnusedLayer(nn.Module):
    """Layers and a norm in the checkpoint that the forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.forgotten = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.old_norm = nn.GroupNorm(4, WIDTH)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.conv(h)


class Coordinates(nn.Module):
    """CoordConv: constant planes, repeated over the batch, are concatenated to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH + 2, WIDTH, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, SIZE)
        planes = torch.stack(torch.meshgrid(line, line, indexing="ij"))
        return self.conv(torch.cat([h, planes.expand(h.shape[0], -1, -1, -1)], dim=1))


class SequenceConv1d(nn.Module):
    """Conv1d and ConvTranspose1d along flattened pixels, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(WIDTH, WIDTH, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(WIDTH, WIDTH, 4, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        y = self.up(self.act(self.down(h.flatten(2)))).reshape(h.shape)
        y += h
        return y


class Autocast(nn.Module):
    """A region in bfloat16, and one where autocast is switched off again, as in CompVis' attention."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.exact = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.coarse(F.silu(h))
            with torch.autocast("cpu", enabled=False):
                y = self.exact(y.float())
        return h + y.float()


class LenOfBatch(Shell):
    """A loop over len(x): torch.export fixes the batch."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = torch.cat([x[i : i + 1] * 1.0 for i in range(len(x))])
        return super().forward(rows, t)


class ShiftedInput(Shell):
    """Arithmetic on x before the stem, and x again at the output."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = 2 * x - 1.0
        return super().forward(x, t) + 0.1 * x


class SecondStem(Shell):
    """A second convolution reads x: a skip past the body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.bypass = nn.Conv2d(3, WIDTH, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.body(self.stem(x), self.embed(t)) + self.bypass(F.avg_pool2d(x, 3, stride=1, padding=1))
        return self.head(F.silu(h))


class LearnedVariance(Shell):
    """Mean and variance: twice the channels of x."""

    out_channels = 6


class FloatTime(Shell):
    """Continuous noise levels: log of t, a Gaussian Fourier embedding with a fixed random matrix."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("frequencies", torch.randn(TIME // 2))

    def embed(self, t: Tensor) -> Tensor:
        angles = torch.log1p(t.float())[:, None] * self.frequencies * 2 * math.pi
        return self.time(torch.cat((angles.sin(), angles.cos()), dim=1))


class TimePlane(Shell):
    """No time MLP: t as one more input plane, beside x."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.stem = nn.Conv2d(4, WIDTH, 3, padding=1)
        del self.time

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        plane = (t.float() / 100)[:, None, None, None].expand(-1, 1, SIZE, SIZE)
        h = self.stem(torch.cat([x, plane], dim=1))
        return self.head(F.silu(self.body(h, h)))


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "batch_norm": lambda: Shell(BatchNormBody()),
    "einsum_attention_in_own_checkpoint": lambda: Shell(OpenAIAttention()),
    "torch_checkpoint_reentrant": lambda: Shell(TorchCheckpoint(True)),
    "torch_checkpoint": lambda: Shell(TorchCheckpoint(False)),
    "bmm_attention": lambda: Shell(DdimAttention()),
    "scale_shift": lambda: Shell(ScaleShift()),
    "asymmetric_pad": lambda: Shell(AsymmetricDown()),
    "token_linear": lambda: Shell(TokenLinear()),
    "masked_attention": lambda: Shell(MaskedAttention()),
    "flat_tokens": lambda: Shell(FlatTokens()),
    "flat_tokens_without_residual": lambda: Shell(FlatNoResidual()),
    "sequence_first": lambda: Shell(SequenceFirst()),
    "matmul_with_parameter": lambda: Shell(MatmulParameter()),
    "einsum_with_parameter": lambda: Shell(EinsumLinear()),
    "weight_standardised": lambda: Shell(WeightStandardised()),
    "parametrised_weights": lambda: Shell(Parametrised()),
    "grouped": lambda: Shell(Grouped()),
    "reused_weights": lambda: Shell(Reuse()),
    "shared_conv_two_norms": lambda: Shell(SharedWithNorms()),
    "computed_weights": lambda: Shell(ComputedWeights()),
    "padding_modes": lambda: Shell(Padded()),
    "additive_skips": lambda: Shell(AdditiveSkips()),
    "pixel_shuffle": lambda: Shell(PixelShuffle()),
    "unused_layer": lambda: Shell(UnusedLayer()),
    "constant_planes": lambda: Shell(Coordinates()),
    "conv1d": lambda: Shell(SequenceConv1d()),
    "autocast": lambda: Shell(Autocast()),
    "len_of_batch": lambda: LenOfBatch(ScaleShift()),
    "shifted_input": lambda: ShiftedInput(ScaleShift()),
    "second_stem": lambda: SecondStem(ScaleShift()),
    "learned_variance": lambda: LearnedVariance(ScaleShift()),
    "float_time": lambda: FloatTime(ScaleShift()),
    "time_plane": lambda: TimePlane(UnusedLayer()),
}


def make(name: str) -> nn.Module:
    """A variant with its own fixed random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return VARIANTS[name]().eval()
