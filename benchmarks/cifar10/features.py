"""A small classifier of CIFAR-10 images, whose features stand in for Inception's where those weights are not at hand.

    python -m benchmarks.cifar10.features --data cifar10.npz --out features.pt

Distances of its features compare rows of one table with each other. They are not FID, and not comparable with published
figures; ``benchmarks/cifar10/table.py`` measures FID where Inception's weights lie on this machine.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar10.data import Images, load_images, scaled

#: Held out for the accuracy that is printed and kept in the file.
_HELD_OUT = 2000


class Classifier(nn.Module):
    """Three pairs of convolutions and a linear layer; the features are the pooled last channels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        layers: list[nn.Module] = []
        inner = 3
        for outer in (width, 2 * width, 4 * width):
            for last in (False, True):
                layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
                layers += [nn.MaxPool2d(2)] if last else []
                inner = outer
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inner, 10)

    def features(self, images: Tensor) -> Tensor:
        """[N, 4 width] of images float32 [N, 3, 32, 32] in [-1, 1]."""
        found: Tensor = self.body(images).mean(dim=(2, 3))
        return found

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        found: Tensor = self.head(self.features(images))
        return found


def load_classifier(path: Path) -> Classifier:
    """Read what `main` wrote; no pickled code is run."""
    found = torch.load(path, weights_only=True)
    classifier = Classifier(found["width"])
    classifier.load_state_dict(found["state"])
    return classifier.eval()


def train(images: Images, width: int, epochs: int, seed: int) -> tuple[Classifier, float]:
    """A classifier and its accuracy on the last `_HELD_OUT` images, which it has not seen."""
    assert images.labels is not None
    torch.manual_seed(seed)
    model = Classifier(width)
    count, batch = len(images.pixels) - _HELD_OUT, 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=5e-2)
    steps = epochs * (count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(0, count, (batch,))
        x = scaled(images.pixels[rows])
        x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(3), x)
        dx, dy = torch.randint(-3, 4, (2,)).tolist()
        x = torch.roll(x, (dy, dx), dims=(2, 3))
        loss = F.cross_entropy(model(x), images.labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(scaled(part)) for part in images.pixels[count:].split(500)])
    return model, float((logits.argmax(dim=1) == images.labels[count:]).double().mean())


def main(argv: list[str] | None = None) -> None:
    """Train, say how good it is, and write it atomically."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file of images with labels")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    images = load_images(args.data)
    if images.labels is None or len(images.pixels) <= _HELD_OUT:
        parser.error(f"--data {args.data}: labels and more than {_HELD_OUT} images are needed")
    model, accuracy = train(images, args.width, args.epochs, args.seed)
    fresh = args.out.with_name(args.out.name + ".new")
    torch.save({"width": args.width, "state": model.state_dict(), "accuracy": accuracy}, fresh)
    os.replace(fresh, args.out)
    print(f"{100 * accuracy:.1f} % of {_HELD_OUT} held-out images recognised")


if __name__ == "__main__":
    main()
