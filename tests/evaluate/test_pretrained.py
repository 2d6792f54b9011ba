"""Networks of other packages: used only where packages and known weights are here, and nothing is downloaded."""

from __future__ import annotations

import hashlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from edadm_compile.evaluate import pretrained


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty checkpoint folder of torch hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: object())


def weights(folder, monkeypatch, value, name="alexnet"):
    """A weight file whose name ends with its checksum, as the packages expect."""
    torch.save(value, folder / "new")
    digest = hashlib.sha256((folder / "new").read_bytes()).hexdigest()[:8]
    path = (folder / "new").rename(folder / f"{name}-{digest}.pth")
    monkeypatch.setattr(pretrained, "ALEXNET" if name == "alexnet" else "INCEPTION", path.name)
    return path


def test_everything_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None if name != "torchvision" else object())
    assert pretrained.lpips_missing((3, 32, 32)) == (
        f"torchmetrics not installed; weights {pretrained.ALEXNET} not in {folder}, and nothing is downloaded"
    )
    assert pretrained.inception_missing((1, 8, 8)).startswith("torch-fidelity not installed; weights weights-inception")


def test_images_that_do_not_fit_are_named(folder, installed):
    assert "too small for LPIPS" in pretrained.lpips_missing((3, 30, 64))
    assert "have 4" in pretrained.lpips_missing((4, 64, 64)) and "have 4" in pretrained.inception_missing((4, 64, 64))


def test_only_the_known_file_of_tensors_is_used(folder, installed, monkeypatch):
    path = weights(folder, monkeypatch, {"w": torch.ones(3)})
    assert pretrained.lpips_missing((3, 31, 31)) == ""
    path.write_bytes(path.read_bytes() + b"x")
    assert "is damaged or another file: its SHA-256 begins with" in pretrained.lpips_missing((3, 31, 31))
    weights(folder, monkeypatch, nn.Conv2d(1, 1, 1))
    assert "does not hold tensors only" in pretrained.lpips_missing((3, 31, 31))


def test_lpips_is_the_mean_over_all_pairs(monkeypatch):
    seen = []

    def distance(a, b, net_type):
        assert net_type == "alex" and a.shape[1] == 3 and float(a.abs().max()) <= 1
        seen.append(len(a))
        return (a - b).abs().mean()

    module = ModuleType("torchmetrics.functional.image")
    module.learned_perceptual_image_patch_similarity = distance
    for name in ("torchmetrics", "torchmetrics.functional"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", module)
    a = torch.rand(70, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 4 - 2
    b = torch.zeros_like(a)
    assert pretrained.lpips(a, b) == pytest.approx(float(a.clamp(-1, 1).abs().mean()), rel=1e-6)
    assert seen == [64, 6]


class Inception(nn.Module):
    """Stands in for torch-fidelity's extractor."""

    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        assert (name, features) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.path = feature_extractor_weights_path

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8 and pixels.shape[1] == 3
        values = pixels.float().mean(dim=(2, 3))
        return values, values[:, :2]


def test_inception_sees_rgb_bytes(folder, monkeypatch):
    module = ModuleType("torch_fidelity")
    module.FeatureExtractorInceptionV3 = Inception
    monkeypatch.setitem(sys.modules, "torch_fidelity", module)
    images = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 9.0]).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    features, logits = pretrained.inception()(images)
    assert features.dtype == torch.float64 and logits.shape == (6, 2)
    assert features[:, 0].tolist() == [0.0, 0.0, 128.0, 191.0, 255.0, 255.0]
