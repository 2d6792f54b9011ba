"""Small artifacts to mutate: compiled once, kept in a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.device_code import DeviceOptions, build
from edadm_compile.frontend import Source, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.passes.base import Silent
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import write

_DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear", "clip_sample": False}


class Chain(nn.Module):
    """Two convolutions and a time path."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(1, 4), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """A prediction for x [B, 1, 4, 4]."""
        return self.last(torch.relu(self.first(x) + self.time(t.float()[:, None] / 100)[:, :, None, None]))


class Attending(nn.Module):
    """A group norm, attention, a linear layer, a class label, an upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.qkv, self.out, self.label = nn.Linear(8, 24), nn.Linear(8, 8), nn.Embedding(3, 8)
        self.head = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """A prediction for x [B, 2, 4, 4]."""
        h = self.stem(x)
        tokens = torch.nn.functional.silu(self.norm(h)).flatten(2).transpose(1, 2) + self.label(label)[:, None]
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        h = h + self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(h.shape)
        return self.head(torch.nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))


def sources() -> dict[str, tuple[Source, QuantConfig]]:
    """The models by name, with the settings they are compiled with."""
    quick = {
        "method": "minmax", "calib_samples": 4, "tdac": TdacConfig(trajectories=1),
        "reconstruction": ReconstructionConfig(iters=0),
    }  # fmt: skip
    torch.manual_seed(0)
    chain = source_from_module(Chain(), SamplerSpec(_DDIM, 2), shape=(1, 4, 4))
    attending = source_from_module(Attending(), SamplerSpec(_DDIM, 2), shape=(2, 4, 4), num_classes={"label": 3})
    return {
        "chain": (chain, QuantConfig(**quick)),
        "attending": (attending, QuantConfig(**quick, attention="int8")),
    }


def make(folder: Path, archs: tuple[str, ...] = ("sm_80",)) -> dict[str, Path]:
    """The artifacts by name, from `folder` where they are there already.

    Args:
        archs: GPU code for these, at batch 1; empty for none (a machine without Triton).
    """
    found = {}
    for name, (source, config) in sources().items():
        path = folder / f"{name}.{'-'.join(archs) or 'cpu'}.qmod"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            result = compile_source(source, config, quality=True)
            bundle = build(result.lowered, DeviceOptions(archs, (1,)), Silent())
            write(dataclasses.replace(to_artifact(result), device=bundle), path)
        found[name] = path
    return found
