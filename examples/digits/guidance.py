"""Give the digits model a null label, so that classifier-free guidance has an unconditional branch.

``model.pt`` knows the ten digits only. This script adds an eleventh label, 10, that means "any digit", and trains on
for a few hundred steps in which a fifth of the labels is replaced by it (Ho and Salimans, arXiv 2207.12598).

Run ``python examples/digits/guidance.py --out guided.pt`` (about two minutes on two CPU cores), then
``edadm-compile guided.pt --guidance 2 --null-label last -o guided.qmod``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel

HERE = Path(__file__).resolve().parent
# Lets the sibling modules be found also when this file is loaded by path through importlib.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from train import (  # noqa: E402
    BATCH,
    MODEL_CONFIG,
    SCHEDULER_CONFIG,
    descend,
    draw_batches,
    draw_timesteps,
    learning_rate,
    progress_reporter,
    save_checkpoint,
    update_average,
)

NULL_LABEL = 10
DROPPED = 0.2
STEPS = 500
PEAK_LR = 5e-4
SEED = 7


def with_null_label(checkpoint: Path) -> UNet2DModel:
    """The trained network with one more label, whose embedding begins as the mean of the ten digits'."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    state = {name: value.float() for name, value in state.items()}
    name = "class_embedding.weight"
    state[name] = torch.cat((state[name], state[name].mean(dim=0, keepdim=True)))
    model = UNet2DModel(**{**MODEL_CONFIG, "num_class_embeds": NULL_LABEL + 1})
    model.load_state_dict(state)
    return model


def train(model: UNet2DModel, steps: int) -> UNet2DModel:
    """Minimise the noise-prediction loss with a fifth of the labels dropped; returns the average of the weights."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    scheduler, average = DDIMScheduler(**SCHEDULER_CONFIG), copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    running = 0.05
    with progress_reporter(steps) as report:
        for step, (images, labels) in zip(range(1, steps + 1), draw_batches(generator), strict=False):
            dropped = torch.rand(BATCH, generator=generator) < DROPPED
            labels = torch.where(dropped, NULL_LABEL, labels)
            noise = torch.randn(images.shape, generator=generator)
            timesteps = draw_timesteps(generator, scheduler.config.num_train_timesteps)
            loss = F.mse_loss(model(scheduler.add_noise(images, noise, timesteps), timesteps, labels).sample, noise)
            descend(loss, model, optimizer, schedule)
            update_average(average, model, step)
            running = 0.98 * running + 0.02 * loss.item()
            report(step, running)
    return average


def main() -> None:
    """Parse the command line, train and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Add a null label to the digits model.")
    parser.add_argument("--model", type=Path, default=HERE / "model.pt", help="checkpoint to start from")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    options = parser.parse_args()
    save_checkpoint(train(with_null_label(options.model), options.steps), options.out)
    print(f"wrote {options.out}: label {NULL_LABEL} is the null label")


if __name__ == "__main__":
    main()
