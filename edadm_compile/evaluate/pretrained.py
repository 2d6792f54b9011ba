"""LPIPS and Inception features through torchmetrics and torch-fidelity, where packages and weights lie on this machine.

Nothing is downloaded: weights must be in torch hub's checkpoint folder, with the checksum that is part of their name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

#: Files that the packages would download; the last group of hexadecimal digits begins the SHA-256 of the content.
ALEXNET = "alexnet-owt-7be5be79.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
#: AlexNet's stride of 4 and two pooling layers leave nothing of smaller images.
_LPIPS_SIDE = 31
#: Images at a time. LPIPS loads its network anew for each batch.
_BATCH = 64


def lpips_missing(shape: tuple[int, ...]) -> str:
    """Why LPIPS cannot be measured on images of `shape` [C, H, W]; "" when it can."""
    if shape[0] not in (1, 3):
        return f"LPIPS takes images with 1 or 3 channels, these have {shape[0]}"
    if min(shape[1:]) < _LPIPS_SIDE:
        return (
            f"images of {shape[1]}x{shape[2]} are too small for LPIPS, whose AlexNet needs {_LPIPS_SIDE}x{_LPIPS_SIDE}"
        )
    return _missing(("torchmetrics", "torchvision"), ALEXNET)


def inception_missing(shape: tuple[int, ...]) -> str:
    """Why Inception features cannot be had of images of `shape` [C, H, W]; "" when they can."""
    if shape[0] not in (1, 3):
        return f"Inception takes images with 1 or 3 channels, these have {shape[0]}"
    return _missing(("torch_fidelity", "torchvision"), INCEPTION)


def lpips(reference: Tensor, value: Tensor) -> float:
    """Mean LPIPS with AlexNet over pairs of images float32 [N, C, H, W] in [-1, 1] (Zhang et al., arXiv 1801.03924)."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    pairs = list(zip(_rgb(reference).split(_BATCH), _rgb(value).split(_BATCH), strict=True))
    with torch.no_grad():
        return sum(len(a) * float(distance(a, b, net_type="alex")) for a, b in pairs) / len(reference)


def inception() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from images float32 [N, C, H, W] in [-1, 1] to features float64 [N, 2048] and logits [N, 1008] of FID."""
    from torch_fidelity import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(_file(INCEPTION))
    )

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = ((_rgb(images) + 1) * 127.5).round().to(torch.uint8)
        with torch.no_grad():
            parts = [network(piece) for piece in pixels.split(_BATCH)]
        return torch.cat([p[0] for p in parts]).double(), torch.cat([p[1] for p in parts]).double()

    return call


def _rgb(images: Tensor) -> Tensor:
    return images.float().clamp(-1, 1).expand(-1, 3, -1, -1)


def _file(name: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _missing(packages: tuple[str, ...], weights: str) -> str:
    absent = [name.replace("_", "-") for name in packages if find_spec(name) is None]
    problems = [f"{' and '.join(absent)} not installed"] if absent else []
    path = _file(weights)
    if not path.is_file():
        problems.append(f"weights {weights} not in {path.parent}, and nothing is downloaded")
    elif not absent:
        problems += _unusable(path)
    return "; ".join(problems)


def _unusable(path: Path) -> list[str]:
    """Problems of a weight file. The packages open it as a pickle, so it must be the known file and hold tensors only."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(path.stem.rpartition("-")[2]):
        return [f"{path} is damaged or another file: its SHA-256 begins with {digest[:8]}"]
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        return [f"{path} does not hold tensors only: {str(error).splitlines()[0][:120]}"]
    return []
