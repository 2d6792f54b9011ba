"""ermongroup/ddim's models/diffusion.py in short: the same modules under the same names, the same arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = timesteps.float()[:, None] * rates[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 0, 1), mode="constant", value=0))


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, temb: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.temb_proj = nn.Linear(temb, outputs)
        self.norm2 = norm(outputs)
        self.dropout = nn.Dropout(0.1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1, 1, 0)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = self.conv2(self.dropout(swish(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        b, c, height, width = q.shape
        q = q.reshape(b, c, height * width).permute(0, 2, 1)
        weights = torch.bmm(q, k.reshape(b, c, height * width)) * (int(c) ** (-0.5))
        weights = nn.functional.softmax(weights, dim=2).permute(0, 2, 1)
        h = torch.bmm(v.reshape(b, c, height * width), weights).reshape(b, c, height, width)
        return x + self.proj_out(h)


class Model(nn.Module):
    """`Model(config)` of the original, its configuration as arguments."""

    def __init__(
        self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, attn_resolutions: tuple[int, ...], resolution: int
    ) -> None:
        super().__init__()
        self.ch, self.levels, self.num_res_blocks = ch, len(ch_mult), num_res_blocks
        temb = ch * 4
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(3, ch, 3, 1, 1)
        multiples = (1, *ch_mult)
        self.down = nn.ModuleList()
        size = resolution
        for level in range(self.levels):
            block, attn = nn.ModuleList(), nn.ModuleList()
            inputs, outputs = ch * multiples[level], ch * ch_mult[level]
            for _ in range(num_res_blocks):
                block.append(ResnetBlock(inputs, outputs, temb))
                inputs = outputs
                if size in attn_resolutions:
                    attn.append(AttnBlock(inputs))
            down = nn.Module()
            down.block, down.attn = block, attn
            if level != self.levels - 1:
                down.downsample = Downsample(inputs)
                size //= 2
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(inputs, inputs, temb)
        self.mid.attn_1 = AttnBlock(inputs)
        self.mid.block_2 = ResnetBlock(inputs, inputs, temb)
        self.up = nn.ModuleList()
        for level in reversed(range(self.levels)):
            block, attn = nn.ModuleList(), nn.ModuleList()
            outputs, skip = ch * ch_mult[level], ch * ch_mult[level]
            for index in range(num_res_blocks + 1):
                if index == num_res_blocks:
                    skip = ch * multiples[level]
                block.append(ResnetBlock(inputs + skip, outputs, temb))
                inputs = outputs
                if size in attn_resolutions:
                    attn.append(AttnBlock(inputs))
            up = nn.Module()
            up.block, up.attn = block, attn
            if level != 0:
                up.upsample = Upsample(inputs)
                size *= 2
            self.up.insert(0, up)
        self.norm_out = norm(inputs)
        self.conv_out = nn.Conv2d(inputs, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = self.temb.dense[0](timestep_embedding(t, self.ch))
        temb = self.temb.dense[1](swish(temb))
        hs = [self.conv_in(x)]
        for level in range(self.levels):
            for index in range(self.num_res_blocks):
                h = self.down[level].block[index](hs[-1], temb)
                if len(self.down[level].attn) > 0:
                    h = self.down[level].attn[index](h)
                hs.append(h)
            if level != self.levels - 1:
                hs.append(self.down[level].downsample(hs[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for level in reversed(range(self.levels)):
            for index in range(self.num_res_blocks + 1):
                h = self.up[level].block[index](torch.cat([h, hs.pop()], dim=1), temb)
                if len(self.up[level].attn) > 0:
                    h = self.up[level].attn[index](h)
            if level != 0:
                h = self.up[level].upsample(h)
        return self.conv_out(swish(self.norm_out(h)))
