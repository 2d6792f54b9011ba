import math

import pytest
import torch

from edadm_compile.evaluate import metrics
from edadm_compile.evaluate.metrics import inception_score, kernel_distance


def _normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def _by_hand(a, b, paired):
    """The definition, pair by pair."""
    k = lambda x, y: (float(x @ y) / len(x) + 1) ** 3  # noqa: E731
    n, m = len(a), len(b)
    first = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    second = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = [k(a[i], b[j]) for i in range(n) for j in range(m) if not paired or i != j]
    return first + second - 2 * sum(across) / len(across)


@pytest.mark.parametrize("paired", [False, True])
def test_against_the_definition(paired):
    a, b = _normal(7, 3, 0), _normal(7 if paired else 5, 3, 1, 0.5)
    assert kernel_distance(a, b, paired=paired)[0] == pytest.approx(_by_hand(a, b, paired), rel=1e-10)


def test_blocks_do_not_change_the_sum():
    a, b = _normal(37, 4, 0), _normal(23, 4, 1)
    torch.testing.assert_close(metrics._kernel_sums(a, b, block=5), metrics._kernel_sums(a, b), rtol=1e-12, atol=0)


def test_one_point_distributions_by_hand():
    """All x at 0 and all y at e: k is 1, 1 and (|e|²/d + 1)³ = 8 with |e|² = d."""
    zero, one = torch.zeros(4, 2), torch.ones(3, 2)
    distance, error = kernel_distance(zero, one)
    assert distance == pytest.approx(1 + 8 - 2 * 1, rel=1e-12) and error == pytest.approx(0.0, abs=1e-9)


def test_equal_pairs_are_at_zero_exactly():
    a = _normal(50, 6, 0)
    assert kernel_distance(a, a, paired=True) == (0.0, 0.0)
    assert kernel_distance(a, a)[0] < -0.01  # the unpaired estimate takes dependent sets for closer than they are


def test_the_estimate_is_unbiased_and_its_error_has_the_right_size():
    found = torch.tensor([kernel_distance(_normal(60, 8, s), _normal(90, 8, 500 + s, 0.5)) for s in range(80)])
    truth = kernel_distance(_normal(6000, 8, 2000), _normal(6000, 8, 2001, 0.5))[0]
    mean, spread = float(found[:, 0].mean()), float(found[:, 0].std())
    assert abs(mean - truth) < 3 * spread / math.sqrt(80)
    assert 0.75 < float(found[:, 1].mean()) / spread < 1.33


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="1 and 5 samples"):
        kernel_distance(_normal(1, 3, 0), _normal(5, 3, 1))
    with pytest.raises(ValueError, match="paired: True"):
        kernel_distance(_normal(4, 3, 0), _normal(5, 3, 1), paired=True)


def test_inception_scores_between_one_and_the_number_of_classes():
    assert inception_score(torch.zeros(6, 4)) == pytest.approx(1.0, rel=1e-12)
    assert inception_score(100 * torch.eye(4).repeat(3, 1)) == pytest.approx(4.0, rel=1e-9)
    half = 100 * torch.eye(4)[[0, 1, 0, 1]]
    assert inception_score(half) == pytest.approx(2.0, rel=1e-9)
