import math

import pytest
import torch

from edadm_compile.evaluate.metrics import decibel, frechet, psnr, sqnr


def _gaussian(mean, covariance, n=4000, seed=0):
    """Samples whose mean and covariance are exactly the given ones."""
    d = len(mean)
    raw = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw = raw - raw.mean(dim=0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return white @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).T + torch.tensor(
        mean, dtype=torch.float64
    )


def test_the_distance_of_a_set_to_itself_is_zero():
    a = _gaussian([1.0, 2.0], [[2.0, 0.5], [0.5, 1.0]])
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-8)


def test_moved_gaussians_are_as_far_apart_as_their_means():
    cov = [[2.0, 0.5], [0.5, 1.0]]
    assert frechet(_gaussian([0.0, 0.0], cov), _gaussian([3.0, -4.0], cov, seed=1)) == pytest.approx(25.0, rel=1e-8)


def test_diagonal_gaussians():
    a = _gaussian([0.0, 1.0, 0.0], [[4.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]])
    b = _gaussian([1.0, 1.0, 2.0], [[1.0, 0, 0], [0, 25.0, 0], [0, 0, 1.0]], seed=1)
    assert frechet(a, b, eps=0.0) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-8)


def test_covariances_that_do_not_commute():
    a, b = [[2.0, 1.0], [1.0, 3.0]], [[5.0, -1.0], [-1.0, 1.0]]
    product = torch.linalg.eigvals(torch.tensor(a, dtype=torch.float64) @ torch.tensor(b, dtype=torch.float64)).real
    expected = 2 + 3 + 5 + 1 - 2 * float(product.sqrt().sum())
    assert frechet(_gaussian([0.0, 0.0], a), _gaussian([0.0, 0.0], b, seed=1), eps=0.0) == pytest.approx(
        expected, rel=1e-8
    )
    assert expected > 0.5


def test_dead_features_do_not_break_the_distance():
    a = _gaussian([0.0, 0.0, 0.0], torch.eye(3).tolist())
    a[:, 1:] = 0.0
    assert frechet(a, a + 1) == pytest.approx(3.0, rel=1e-6)


def test_decibels():
    assert decibel(100.0, 1.0) == 20.0 and decibel(1.0, 0.0) == math.inf and decibel(0.0, 1.0) == -math.inf
    assert decibel(1.0, math.inf) == -math.inf and math.isnan(decibel(1.0, math.nan))
    reference = torch.tensor([3.0, 4.0])
    assert sqnr(reference, reference + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(reference, 2 * reference) == pytest.approx(0.0)
    assert sqnr(reference, reference) == math.inf


def test_psnr_is_per_image_and_clamps():
    reference = torch.zeros(3, 1, 2, 2)
    value = reference.clone()
    value[0], value[1] = 0.2, 7.0
    found = psnr(reference, value)
    assert found.shape == (3,) and float(found[0]) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-5)
    assert float(found[1]) == pytest.approx(10 * math.log10(4 / 1.0)) and float(found[2]) > 200
