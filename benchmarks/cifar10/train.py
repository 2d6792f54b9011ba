"""Train a UNet of the DDIM CIFAR-10 family on the images of an npz file.

    python -m benchmarks.cifar10.train --data cifar10.npz --out DIR                        # CPU or GPU, 8.9 million parameters
    python -m benchmarks.cifar10.train --data cifar10.npz --out DIR --minutes 15 --bf16 --compile     # on a GPU
    python -m benchmarks.cifar10.train --data cifar10.npz --out DIR --width 32 --layers 1 --minutes 45  # 1.5 million, one core

``DIR/model`` is a diffusers folder with the averaged weights in fp16, which the compiler reads; ``DIR/state.pt`` is what a
second call with the same ``--out`` goes on from. Both are replaced atomically every ``--save-minutes`` and at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from benchmarks.cifar10.data import Images, load_images, scaled
from benchmarks.cifar10.model import save_folder, scheduler_config, unet_config

_WARMUP = 100


@dataclass(frozen=True)
class Recipe:
    """What the weights depend on besides the data; a state file of another recipe is refused."""

    width: int
    layers: int
    conditional: bool
    schedule: str
    prediction: str
    batch: int
    rate: float
    ema: float
    seed: int


class Trainer:
    """The network, its average, the optimizer and the random state."""

    def __init__(self, recipe: Recipe, images: Images, device: str, *, bf16: bool, fused: bool) -> None:
        torch.manual_seed(recipe.seed)
        config = unet_config(recipe.width, recipe.layers, conditional=recipe.conditional)
        self.recipe, self.device, self.bf16 = recipe, device, bf16
        layout = torch.channels_last if device == "cuda" else torch.contiguous_format
        self.model = UNet2DModel(**config).to(device, memory_format=layout)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.predict: Any = torch.compile(self.model) if fused else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=device == "cuda"
        )
        self.scheduler = DDIMScheduler(**scheduler_config(recipe.schedule, recipe.prediction))
        self.images = images.to(device)
        self.generator = torch.Generator(device).manual_seed(recipe.seed)  # draws where they are used
        self.step, self.seconds, self.loss = 0, 0.0, 1.0

    def _batch(self) -> tuple[Tensor, list[Tensor]]:
        """Images in [-1, 1], half of them mirrored, and their labels where the network takes them."""
        size = self.recipe.batch
        rows = torch.randint(0, len(self.images.pixels), (size,), generator=self.generator, device=self.device)
        mirrored = torch.rand(size, 1, 1, 1, generator=self.generator, device=self.device) < 0.5
        x = scaled(self.images.pixels[rows])
        labels = [self.images.labels[rows]] if self.recipe.conditional and self.images.labels is not None else []
        return torch.where(mirrored, x.flip(3), x), labels

    def advance(self, progress: float) -> None:
        """One optimizer step at a share `progress` of the training."""
        x, labels = self._batch()
        size, total = self.recipe.batch, self.scheduler.config.num_train_timesteps
        # One timestep from each of `batch` equal strata: the same mean of the loss with less variance.
        inside = torch.rand(size, generator=self.generator, device=self.device)
        t = ((torch.arange(size, device=self.device) + inside) / size * total).long().clamp(max=total - 1)
        noise = torch.randn(x.shape, generator=self.generator, device=self.device)
        noisy = self.scheduler.add_noise(x, noise, t)
        target = noise if self.recipe.prediction == "epsilon" else self.scheduler.get_velocity(x, noise, t)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate * _rate(self.step, progress)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            prediction = self.predict(noisy, t, *labels).sample
        loss = F.mse_loss(prediction.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(self.recipe.ema, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        if self.step % 10 == 0:  # reading the loss waits for a GPU
            self.loss = 0.9 * self.loss + 0.1 * float(loss.detach())

    def save(self, out: Path) -> None:
        """``out/state.pt`` and ``out/model``, each replaced in one step."""
        state = {
            "recipe": asdict(self.recipe), "step": self.step, "seconds": self.seconds, "loss": self.loss,
            "model": self.model.state_dict(), "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        torch.save(state, out / "state.pt.new")
        os.replace(out / "state.pt.new", out / "state.pt")
        save_folder(
            self.average, scheduler_config(self.recipe.schedule, self.recipe.prediction), out / "model", self.about()
        )

    def restore(self, path: Path) -> None:
        """Go on from a state file.

        Raises:
            SystemExit: it belongs to another recipe.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise SystemExit(f"{path} was made with {state['recipe']}, not {asdict(self.recipe)}; choose another --out")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]

    def about(self) -> dict[str, Any]:
        """What goes into ``training.json``."""
        return {
            **asdict(self.recipe), "steps": self.step, "minutes": round(self.seconds / 60, 1), "device": self.device,
            "bf16": self.bf16, "images": len(self.images.pixels), "loss": round(self.loss, 5),
            "parameters": sum(p.numel() for p in self.average.parameters()), "torch": torch.__version__,
        }  # fmt: skip


def _rate(step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to nearly zero, as a factor of the peak rate."""
    return min(1.0, (step + 1) / _WARMUP) * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) + 1e-3)


def train(
    trainer: Trainer, out: Path, steps: int, minutes: float, save_minutes: float, pause_minutes: float = math.inf
) -> None:
    """Train until `steps` or `minutes` (those of earlier calls count) are over, or `pause_minutes` of this call."""
    start, before, saved = time.monotonic(), trainer.seconds, time.monotonic()
    while time.monotonic() - start < 60 * pause_minutes:
        trainer.seconds = before + time.monotonic() - start
        progress = max(trainer.step / steps, trainer.seconds / (60 * minutes))
        if progress >= 1:
            break
        trainer.advance(progress)
        if trainer.step % 100 == 0:
            print(f"step {trainer.step}  loss {trainer.loss:.4f}  {100 * progress:.0f} % done", flush=True)
        if time.monotonic() - saved > 60 * save_minutes:
            trainer.save(out)
            saved = time.monotonic()
    trainer.save(out)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, and write the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file of images, see benchmarks/cifar10/data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the training state")
    parser.add_argument("--width", type=int, default=64, help="channels at 32x32 (the paper: 128)")
    parser.add_argument("--layers", type=int, default=2, help="residual blocks per level")
    parser.add_argument("--steps", type=int, default=100_000, help="most optimizer steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="most minutes of training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--ema", type=float, default=0.9995, help="decay of the averaged weights")
    parser.add_argument("--schedule", choices=("linear", "cosine"), default="linear")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--conditional", action="store_true", help="class labels as a condition")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="forward and backward in bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument(
        "--pause-minutes",
        type=float,
        default=math.inf,
        help="stop this call then; the next goes on (learning rate too)",
    )
    args = parser.parse_args(argv)
    images = load_images(args.data)
    if args.conditional and images.labels is None:
        parser.error(f"--conditional: {args.data} has no labels")
    recipe = Recipe(**{name: getattr(args, name) for name in Recipe.__dataclass_fields__})
    trainer = Trainer(recipe, images, args.device, bf16=args.bf16, fused=args.compile)
    if (args.out / "state.pt").exists():
        trainer.restore(args.out / "state.pt")
        print(f"goes on from step {trainer.step}", flush=True)
    train(trainer, args.out, args.steps, args.minutes, args.save_minutes, args.pause_minutes)
    print(json.dumps(trainer.about()))


if __name__ == "__main__":
    main()
