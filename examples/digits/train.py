"""Train the class-conditional noise predictor of this example and write ``model.pt``.

The network is a small ``diffusers.UNet2DModel`` that learns to predict the noise mixed into 16x16 digits.
Nothing is downloaded: the digits ship inside scikit-learn.

Run ``python examples/digits/train.py`` (about a quarter of an hour on two CPU cores).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

HERE = Path(__file__).resolve().parent
# Lets the sibling module be found also when this file is loaded by path through importlib.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from classifier import load_real_digits, random_shift  # noqa: E402

CHECKPOINT_FORMAT = "edadm_compile.checkpoint/1"
SEED = 2024
STEPS = 3400
BATCH = 64
PEAK_LR = 2e-3
WARMUP = 100
EMA_DECAY = 0.998
SAMPLING_STEPS = 50

MODEL_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    # Few channels at 16x16, so that the full-resolution layers hold under a tenth of the parameters.
    "block_out_channels": [24, 64, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "add_attention": False,
    "attention_head_dim": 32,
    "norm_num_groups": 8,
    "num_class_embeds": 10,
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": True,
}


def plain(value: Any) -> Any:
    """Turn a configuration into lists, dictionaries and scalars that ``weights_only`` loading accepts."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not key.startswith("_")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def save_checkpoint(model: UNet2DModel, path: Path) -> None:
    """Write the checkpoint atomically, with the weights rounded to fp16.

    Args:
        model: the network to store, normally the weight average.
        path: destination; replaced in one step, so that a reader never sees half a file.
    """
    scheduler = plain(dict(DDIMScheduler(**SCHEDULER_CONFIG).config))
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    payload = {
        "format": CHECKPOINT_FORMAT,
        "model": {"class_name": "UNet2DModel", "config": plain(dict(model.config))},
        "state_dict": state,
        "scheduler": {"_class_name": "DDIMScheduler", **scheduler},
        "sampler": {"steps": SAMPLING_STEPS},
    }
    temporary = path.with_name(path.name + ".tmp")
    torch.save(payload, temporary)
    os.replace(temporary, path)


def learning_rate(step: int, total: int) -> float:
    """Linear warm-up followed by a cosine down to nearly zero, as a factor of the peak rate."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (step - WARMUP) / max(1, total - WARMUP))) + 1e-3


def update_average(average: UNet2DModel, model: UNet2DModel, step: int) -> None:
    """Move the weight average towards the current weights; short memory at first, ``EMA_DECAY`` later."""
    decay = min(EMA_DECAY, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)


def draw_batches(generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches without end.

    Yields:
        images float32 ``[BATCH, 1, 16, 16]`` in ``[-1, 1]`` shifted by at most one pixel, and labels int64
        ``[BATCH]``.
    """
    images, labels = load_real_digits()
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            picked = order[start : start + BATCH]
            yield random_shift(images[picked], generator), labels[picked]


def draw_timesteps(generator: torch.Generator, total: int) -> Tensor:
    """Draw one timestep from each of ``BATCH`` equal strata, which lowers the variance of the loss.

    Returns:
        int64 ``[BATCH]`` in ``[0, total)``.
    """
    fractions = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    # Batches are shuffled already, so the ascending order ties no image to a noise level.
    return (fractions * total).long().clamp(max=total - 1)


@contextmanager
def progress_reporter(total: int) -> Iterator[Callable[[int, float], None]]:
    """Offer ``report(step, loss)``: a live bar on a terminal, a plain line now and then elsewhere."""
    console, begin = Console(), time.monotonic()
    if console.is_terminal:
        loss_column = TextColumn("loss {task.fields[loss]:.4f}")
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), loss_column, TimeRemainingColumn())
        with Progress(*columns, TextColumn("left"), console=console) as bar:
            task = bar.add_task("train", total=total, loss=float("nan"))
            yield lambda step, loss: bar.update(task, completed=step, loss=loss)
        return

    def report(step: int, loss: float) -> None:
        if step % 200 == 0 or step == total:
            left = (time.monotonic() - begin) / step * (total - step)
            print(f"step {step}/{total}  loss {loss:.4f}  {left / 60:.1f} min left", flush=True)

    yield report


def descend(
    loss: Tensor, model: UNet2DModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler
) -> None:
    """One step of the optimizer on a scalar `loss`, with clipped gradients."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def train(steps: int, report: Callable[[int, float], None], snapshot: Callable[[UNet2DModel], None]) -> UNet2DModel:
    """Minimise the DDPM noise-prediction loss.

    Args:
        steps: optimizer steps.
        report: receives the step count and a running mean of the loss.
        snapshot: receives the weight average every 800 steps.

    Returns:
        The exponential moving average of the weights.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model, scheduler = UNet2DModel(**MODEL_CONFIG), DDIMScheduler(**SCHEDULER_CONFIG)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    running = 1.0
    for step, (images, labels) in zip(range(1, steps + 1), draw_batches(generator), strict=False):
        noise = torch.randn(images.shape, generator=generator)
        timesteps = draw_timesteps(generator, scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(model(noisy, timesteps, labels).sample, noise)
        descend(loss, model, optimizer, schedule)
        update_average(average, model, step)
        running = 0.98 * running + 0.02 * loss.item()
        report(step, running)
        if step % 800 == 0:
            snapshot(average)
    return average


def main() -> None:
    """Parse the command line, train and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the digits example (16x16, class-conditional).")
    parser.add_argument("--out", type=Path, default=HERE / "model.pt", help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--snapshots", action="store_true", help="also write unfinished states to --out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    begin = time.monotonic()

    def snapshot(average: UNet2DModel) -> None:
        if options.snapshots:
            save_checkpoint(average, options.out)

    with progress_reporter(options.steps) as report:
        average = train(options.steps, report, snapshot)
    save_checkpoint(average, options.out)
    parameters, size = sum(p.numel() for p in average.parameters()), options.out.stat().st_size
    print(f"wrote {options.out}: {parameters} parameters, {size / 1e6:.2f} MB", end=", ")
    print(f"trained in {(time.monotonic() - begin) / 60:.1f} min")


if __name__ == "__main__":
    main()
