"""Sample digits from ``model.pt`` and say how good they are.

Run ``python examples/digits/evaluate.py [--n 1000] [--json] [--grid samples.png]``.

Two numbers are reported: the share of samples that the classifier recognises as the digit asked for, and the
Fréchet distance between samples and real digits in the classifier's feature space. The distance between two
random halves of the real digits is printed beside it, as the value that no model can be expected to beat.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

HERE = Path(__file__).resolve().parent
# Lets the sibling module be found also when this file is loaded by path through importlib.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from classifier import DigitClassifier, load_classifier, load_real_digits  # noqa: E402

SEED = 1234
BATCH = 250


def load_checkpoint(path: Path) -> tuple[UNet2DModel, DDIMScheduler, int]:
    """Rebuild the network and its sampler from a checkpoint.

    Args:
        path: file written by ``train.py``.

    Returns:
        The network in float32 (holding fp16-rounded weights) in evaluation mode, the DDIM scheduler, and the
        number of sampling steps.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model = UNet2DModel(**checkpoint["model"]["config"])
    model.load_state_dict({name: value.float() for name, value in checkpoint["state_dict"].items()})
    scheduler = DDIMScheduler.from_config(checkpoint["scheduler"])
    return model.eval().requires_grad_(False), scheduler, int(checkpoint["sampler"]["steps"])


def sample_digits(model: UNet2DModel, scheduler: DDIMScheduler, steps: int, labels: Tensor) -> Tensor:
    """Run deterministic DDIM from fixed noise.

    Args:
        model: noise predictor.
        scheduler: its DDIM scheduler.
        steps: number of sampling steps.
        labels: int64 ``[N]``, the digits asked for.

    Returns:
        float32 ``[N, 1, 16, 16]`` cut to ``[-1, 1]``.
    """
    size = model.config.sample_size
    # All noise is drawn at once, so the samples do not depend on the batch size.
    noise = torch.randn(len(labels), 1, size, size, generator=torch.Generator().manual_seed(SEED))
    done = []
    for x, wanted in zip(noise.split(BATCH), labels.split(BATCH), strict=True):
        scheduler.set_timesteps(steps)
        for timestep in scheduler.timesteps:
            predicted = model(x, timestep, wanted).sample
            x = scheduler.step(predicted, timestep, x).prev_sample
        done.append(x)
    return torch.cat(done).clamp(-1.0, 1.0)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two sets of features.

    Args:
        first: float32 ``[N, d]``.
        second: float32 ``[M, d]``.

    Returns:
        ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``, at least 0.
    """
    means, covariances = [], []
    for features in (first.double(), second.double()):
        means.append(features.mean(0))
        # A small ridge keeps the root defined where features are nearly constant.
        covariances.append(torch.cov(features.T) + 1e-6 * torch.eye(features.shape[1], dtype=torch.float64))
    # (C1 C2)^(1/2) has the trace of the symmetric (R C2 R)^(1/2) with R = C1^(1/2), so that real, stable
    # symmetric eigenvalues are enough.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * cross
    return max(0.0, distance.item())


def judge(classifier: DigitClassifier, samples: Tensor, labels: Tensor) -> dict[str, Any]:
    """Compute every reported number.

    Args:
        classifier: trained digit classifier.
        samples: float32 ``[N, 1, 16, 16]``.
        labels: int64 ``[N]``, the digits asked for.

    Returns:
        Plain dictionary with accuracies between 0 and 1 and Fréchet distances.
    """
    real, _ = load_real_digits()
    correct = (classifier(samples).argmax(1) == labels).double()
    real_features = classifier.features(real)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(SEED))
    halves = real_features[order].tensor_split(2)
    present = [digit for digit in range(10) if (labels == digit).any()]
    return {
        "samples": len(labels),
        "accuracy": correct.mean().item(),
        "accuracy_per_class": {str(digit): correct[labels == digit].mean().item() for digit in present},
        "frechet": frechet_distance(classifier.features(samples), real_features),
        "frechet_real_halves": frechet_distance(halves[0], halves[1]),
    }


def write_grid(samples: Tensor, labels: Tensor, path: Path, columns: int = 16, scale: int = 3) -> None:
    """Write a PNG with one row of samples for each class.

    Args:
        samples: float32 ``[N, 1, 16, 16]`` in ``[-1, 1]``.
        labels: int64 ``[N]``.
        path: PNG to write.
        columns: most samples in a row.
        scale: how many pixels of the PNG one pixel of a sample covers, per side.
    """
    from matplotlib import image

    size = samples.shape[-1]
    grid = torch.full((10 * (size + 1), columns * (size + 1)), -1.0)
    for digit in range(10):
        for column, sample in enumerate(samples[labels == digit][:columns]):
            top, left = digit * (size + 1), column * (size + 1)
            grid[top : top + size, left : left + size] = sample[0]
    large = grid.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.imsave(path, large.numpy(), cmap="gray", vmin=-1.0, vmax=1.0)


def main() -> None:
    """Parse the command line, sample, judge and print."""
    parser = argparse.ArgumentParser(description="Sample from the digits example and judge the samples.")
    parser.add_argument("--model", type=Path, default=HERE / "model.pt", help="checkpoint to judge")
    parser.add_argument("--n", type=int, default=1000, help="number of samples, spread evenly over classes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--grid", type=Path, help="also write a PNG of samples, one row for each class")
    options = parser.parse_args()
    if options.n < 10:
        parser.error("--n must be at least 10")
    torch.set_num_threads(2)
    model, scheduler, steps = load_checkpoint(options.model)
    labels, begin = torch.arange(options.n) % 10, time.monotonic()
    samples = sample_digits(model, scheduler, steps, labels)
    seconds = time.monotonic() - begin
    result = {"steps": steps, **judge(load_classifier(), samples, labels), "sampling_seconds": seconds}
    if options.grid:
        write_grid(samples, labels, options.grid)
    if options.json:
        print(json.dumps(result))
        return
    for digit, accuracy in result["accuracy_per_class"].items():
        print(f"digit {digit}: {100 * accuracy:5.1f} % recognised")
    print(f"overall: {100 * result['accuracy']:.1f} % of {options.n} samples recognised as intended")
    print(f"Fréchet distance to the real digits: {result['frechet']:.3f}", end=" ")
    print(f"(two halves of the real digits: {result['frechet_real_halves']:.3f})")
    print(f"sampled in {result['sampling_seconds']:.0f} s, {steps} DDIM steps")


if __name__ == "__main__":
    main()
