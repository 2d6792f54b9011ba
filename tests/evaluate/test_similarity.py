import pytest
import torch

from edadm_compile.evaluate.similarity import ssim, window_for

C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2


def _random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def test_equal_images_are_at_one():
    images = _random(3, 2, 16, 13)
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def test_constant_images_differ_in_luminance_alone():
    a, b = torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), 0.25)
    expected = (2 * 0.5 * 0.25 + C1) / (0.5**2 + 0.25**2 + C1)
    assert float(ssim(a, b)) == pytest.approx(expected, rel=1e-9) and expected < 0.81


def test_one_window_by_hand():
    """An image of 11 x 11 has one position: the formula with a two-dimensional window."""
    x, y = _random(1, 1, 11, 11), _random(1, 1, 11, 11, seed=1)
    row, column = torch.meshgrid(torch.arange(11) - 5.0, torch.arange(11) - 5.0, indexing="ij")
    w = torch.exp(-(row.double() ** 2 + column.double() ** 2) / (2 * 1.5**2))
    w = w / w.sum()
    mx, my = (w * x[0, 0]).sum(), (w * y[0, 0]).sum()
    vx, vy = (w * (x[0, 0] - mx) ** 2).sum(), (w * (y[0, 0] - my) ** 2).sum()
    cov = (w * (x[0, 0] - mx) * (y[0, 0] - my)).sum()
    expected = (2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    assert float(ssim(x, y)) == pytest.approx(float(expected), rel=1e-10)


def test_a_negative_without_mean_is_as_far_as_can_be():
    """Where windowed means are 0 and variances 1, the formula is (C2 - 2) / (C2 + 2)."""
    x = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)[None]).double()[None, None]
    assert float(ssim(x, -x)) == pytest.approx((C2 - 2) / (C2 + 2), abs=1e-6)


def test_each_image_counts_alone_and_channels_are_averaged():
    x, y = _random(2, 3, 14, 14), _random(2, 3, 14, 14, seed=1)
    both = ssim(x, y)
    assert both.shape == (2,) and float(both[1]) == pytest.approx(float(ssim(x[1:], y[1:])), rel=1e-12)
    channels = [float(ssim(x[:1, c : c + 1], y[:1, c : c + 1])) for c in range(3)]
    assert float(both[0]) == pytest.approx(sum(channels) / 3, rel=1e-12)


def test_values_outside_of_the_range_are_clamped():
    x = _random(1, 1, 12, 12) * 3
    assert float(ssim(x, x.clamp(-1, 1))) == pytest.approx(1.0, abs=1e-12)
    assert float(ssim(x, x.clamp(-1, 1), data_range=6.0)) < 0.99


def test_the_window_shrinks_with_the_image():
    assert [window_for(*s) for s in ((64, 64), (11, 40), (10, 40), (16, 8), (2, 9), (1, 1))] == [11, 11, 9, 7, 1, 1]
    x, y = _random(1, 1, 4, 4), _random(1, 1, 4, 4, seed=1)
    assert 0 < abs(float(ssim(x, y))) < 1
