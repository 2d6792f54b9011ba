"""Real digits and a small classifier that judges generated ones.

``load_real_digits`` is the one place where the data are read and scaled, so the training of the diffusion
model, the training of this classifier and the evaluation all see the same pixels.

Run ``python examples/digits/classifier.py`` to train the classifier again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
WEIGHTS_PATH = HERE / "classifier.safetensors"
IMAGE_SIZE = 16
FEATURE_DIM = 48
SEED = 7


def load_real_digits() -> tuple[Tensor, Tensor]:
    """Load scikit-learn's handwritten digits at the size the diffusion model works at.

    Returns:
        images: float32 ``[1797, 1, 16, 16]`` in ``[-1, 1]`` (-1 is background, 1 is full ink).
        labels: int64 ``[1797]`` with the digit 0..9.
    """
    data = load_digits()
    small = torch.from_numpy(data.images).float().unsqueeze(1) / 8.0 - 1.0
    # Bicubic keeps strokes crisper than bilinear; its overshoot is cut off so that [-1, 1] holds.
    images = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return images.clamp(-1.0, 1.0), torch.from_numpy(data.target).long()


def random_shift(images: Tensor, generator: torch.Generator, max_shift: int = 1) -> Tensor:
    """Shift every image by up to ``max_shift`` pixels in each direction, filling with background.

    Args:
        images: float32 ``[N, 1, H, W]`` in ``[-1, 1]``.
        generator: source of the shifts.
        max_shift: largest shift in pixels.

    Returns:
        float32 ``[N, 1, H, W]``.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [max_shift] * 4, value=-1.0)
    dy, dx = torch.randint(0, 2 * max_shift + 1, (2, count), generator=generator)
    rows = dy[:, None, None] + torch.arange(height)[None, :, None]
    cols = dx[:, None, None] + torch.arange(width)[None, None, :]
    picked = padded[torch.arange(count)[:, None, None], 0, rows, cols]
    return picked.unsqueeze(1)


class DigitClassifier(nn.Module):
    """Three-convolution network for 16x16 digits, about 29 thousand parameters."""

    def __init__(self) -> None:
        """Build the layers with fresh random weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.norm1, self.norm2, self.norm3 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 32), nn.GroupNorm(4, 48)
        self.hidden = nn.Linear(48 * 2 * 2, FEATURE_DIM)
        self.out = nn.Linear(FEATURE_DIM, 10)

    def features(self, images: Tensor) -> Tensor:
        """Compute the penultimate activations, the space in which Fréchet distances are measured.

        Args:
            images: float32 ``[N, 1, 16, 16]`` in ``[-1, 1]``.

        Returns:
            float32 ``[N, 48]``.
        """
        x = F.max_pool2d(F.silu(self.norm1(self.conv1(images))), 2)
        x = F.max_pool2d(F.silu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.silu(self.norm3(self.conv3(x))), 2)
        # SiLU rather than ReLU: no feature is dead, so the feature covariance is better conditioned.
        return F.silu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: float32 ``[N, 1, 16, 16]`` in ``[-1, 1]``.

        Returns:
            float32 logits ``[N, 10]``.
        """
        return self.out(self.features(images))


def load_classifier(path: str | os.PathLike[str] = WEIGHTS_PATH) -> DigitClassifier:
    """Load a trained classifier, ready for inference.

    Args:
        path: safetensors file written by ``train_classifier``.

    Returns:
        The classifier in evaluation mode with gradients switched off.
    """
    model = DigitClassifier()
    model.load_state_dict(load_file(os.fspath(path)))
    return model.eval().requires_grad_(False)


def split_indices(labels: Tensor, held_out_share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Split the data at random (fixed seed) into training and held-out indices.

    Args:
        labels: int64 ``[N]``; only its length matters.
        held_out_share: share of the images kept out of training.

    Returns:
        int64 training indices and int64 held-out indices.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    held_out = int(len(labels) * held_out_share)
    return order[held_out:], order[:held_out]


def train_classifier(path: str | os.PathLike[str] = WEIGHTS_PATH, epochs: int = 40) -> float:
    """Train the classifier on 80 % of the real digits and save it.

    Args:
        path: where the safetensors file goes.
        epochs: passes over the training images.

    Returns:
        Accuracy on the held-out 20 %, between 0 and 1.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED + 1)
    images, labels = load_real_digits()
    train, held_out = split_indices(labels)
    model, batch = DigitClassifier(), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(train) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(epochs):
        shuffled = train[torch.randperm(len(train), generator=generator)]
        for start in range(0, len(train) - batch + 1, batch):
            picked = shuffled[start : start + batch]
            x = random_shift(images[picked], generator)
            # Mild noise, so that traces of sampling noise in generated digits do not decide the class.
            x = x + 0.08 * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(model(x), labels[picked], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    _save_atomically(model, Path(path))
    correct = load_classifier(path)(images[held_out]).argmax(1) == labels[held_out]
    return correct.float().mean().item()


def _save_atomically(model: DigitClassifier, path: Path) -> None:
    """Write the weights so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(save({name: value.contiguous() for name, value in model.state_dict().items()}))
    os.replace(temporary, path)


if __name__ == "__main__":
    torch.set_num_threads(2)
    accuracy = train_classifier()
    parameters = sum(p.numel() for p in DigitClassifier().parameters())
    print(f"classifier: {parameters} parameters, held-out accuracy {100 * accuracy:.2f} %")
