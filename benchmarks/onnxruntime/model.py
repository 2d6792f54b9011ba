"""What is compared: the float model, and the states it is called with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.calibration import sampler
from edadm_compile.errors import InputError
from edadm_compile.frontend import LoadOptions, Source, load_source, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.passes.capture import CallAdapter

#: google/ddpm-cifar10-32; the weights are random.
CIFAR10: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "center_input_sample": False,
    "time_embedding_type": "positional", "freq_shift": 1, "flip_sin_to_cos": False,
    "block_out_channels": (128, 256, 256, 256), "mid_block_scale_factor": 1, "downsample_padding": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "act_fn": "silu", "attention_head_dim": None, "norm_eps": 1e-6,
}  # fmt: skip
#: As in the tests of the compiler: what a compiled file of the random model is made for.
_SCHEDULER = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02,
    "beta_schedule": "linear", "clip_sample": False,
}  # fmt: skip
_STEPS = 10

#: Inputs of one call: x [B, C, H, W], t [B], conditions.
Inputs = list[Tensor]


@dataclass(frozen=True)
class Subject:
    """The float model under comparison.

    Attributes:
        name: for people and for the cache.
        source: the model with its signature and sampler.
        trajectory: states come from a float trajectory; otherwise x is noise at every timestep.
    """

    name: str
    source: Source
    trajectory: bool

    @property
    def names(self) -> list[str]:
        """Names of the inputs: the parameters of the model's forward."""
        return [spec.name for spec in self.source.signature.inputs]

    def adapter(self) -> CallAdapter:
        """The eager model as ``(x, t, *conditions) -> prediction``."""
        assert self.source.module is not None
        return CallAdapter(self.source.module, self.names[2:], self.source.fixed).eval()

    def digest(self) -> str:
        """Of the weights and the signature: names the cache."""
        assert self.source.module is not None
        state = hashlib.sha256(repr((self.source.signature, self.source.fixed)).encode())
        for name, value in sorted(self.source.module.state_dict().items()):
            state.update(name.encode())
            state.update(value.detach().contiguous().numpy().tobytes())
        return state.hexdigest()[:12]

    def states(self, count: int, rows: int, seed: int) -> list[Inputs]:
        """Inputs at `count` evenly spaced timesteps of the sampler, noisiest first.

        Args:
            rows: images in each; all at the same timestep, as a sampler calls the model.
            seed: of noise and labels.
        """
        generator = torch.Generator().manual_seed(seed)
        signature, spec = self.source.signature, self.source.sampler
        noise = sampler.draw_noise(signature, rows, generator)
        conditions = sampler.draw_conditions(signature, rows, generator, self.source.conditions)
        seen: list[tuple[float, Tensor]] = [(t, noise) for t in sampler.timesteps(spec)]
        if self.trajectory:
            seen = []
            sampler.sample(
                self.source.denoiser(), spec, noise, conditions, generator=generator,
                hook=lambda index, t, x, prediction: seen.append((t, x.clone())),
            )  # fmt: skip
        chosen = [seen[i] for i in torch.linspace(0, len(seen) - 1, count).round().long().tolist()]
        fresh = [x if self.trajectory else sampler.draw_noise(signature, rows, generator) for _, x in chosen]
        steps = [torch.full((rows,), t).to(signature.inputs[1].dtype) for t, _ in chosen]
        return [[x, t, *conditions] for x, t in zip(fresh, steps, strict=True)]


def load(path: Path | None, steps: int | None, states: str | None) -> Subject:
    """The model a path holds, or the CIFAR-10 configuration with random weights (seed 0).

    Args:
        steps: of the sampler; None for the model's own.
        states: "noise" or "trajectory"; None for noise with random weights, trajectories with trained ones.

    Raises:
        InputError: the path cannot be used, or holds a captured graph: exporters want a module.
    """
    if path is not None:
        source = load_source(path, LoadOptions(steps=steps))
        if source.module is None:
            raise InputError(f"{path} is a captured graph; the exporters need a module: give a checkpoint or a folder")
        return Subject(path.parent.name if path.stem == "model" else path.stem, source, states != "noise")
    import diffusers

    torch.manual_seed(0)
    module = diffusers.UNet2DModel(**CIFAR10)
    spec = SamplerSpec(_SCHEDULER, steps or _STEPS)
    source = source_from_module(module, spec, fixed={"return_dict": False})
    return Subject("cifar10", source, states == "trajectory")


def rows_of(inputs: Inputs, size: int) -> list[Inputs]:
    """Slices of `size` rows; a remainder is left out."""
    whole = len(inputs[0]) // size
    return [[value[i * size : (i + 1) * size] for value in inputs] for i in range(whole)]
