import math

import torch

from edadm_compile.evaluate.paired import sample_pairs
from edadm_compile.ir.program import SamplerSpec

DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear", "clip_sample": False}
SPEC = SamplerSpec(DDPM, 5)


def _noise(n):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def _half(x, t, *conditions):
    return 0.5 * x


def test_both_models_see_the_same_noise_of_a_random_sampler():
    pairs = sample_pairs(_half, lambda x, t: 0.5 * x, SPEC, _noise(5), [], batch=2, seed=7)
    assert torch.equal(pairs.reference, pairs.candidate) and pairs.noise.sqnr == math.inf
    other = sample_pairs(_half, _half, SPEC, _noise(5), [], batch=2, seed=8)
    assert not torch.equal(pairs.reference, other.reference)  # the sampler is random indeed
    same = sample_pairs(_half, _half, SPEC, _noise(1).expand(4, -1, -1, -1), [], batch=2, seed=7)
    assert not torch.equal(same.reference[:2], same.reference[2:])  # batches do not repeat each other's noise


def test_errors_add_up_over_batches():
    """A tenth too much everywhere is 20 dB, at every step and over all."""
    pairs = sample_pairs(_half, lambda x, t: 0.55 * x, SPEC, _noise(5), [], batch=2, seed=0)
    assert pairs.timesteps == (80.0, 60.0, 40.0, 20.0, 0.0)
    for value in (pairs.noise.sqnr, pairs.noise.sqnr_without_last, *pairs.noise.per_step):
        assert abs(value - 20) < 1e-4
    assert pairs.reference.shape == pairs.candidate.shape == (5, 1, 4, 4)


def test_conditions_stay_with_their_images():
    seen = []

    def model(x, t, label):
        seen.append((x[:, 0, 0, 0].tolist(), label.tolist()))
        return 0.5 * x

    x, labels = _noise(3), torch.tensor([4, 5, 6])
    sample_pairs(model, model, SamplerSpec(DDPM, 1), x, [labels], batch=2, seed=0)
    first = x[:, 0, 0, 0].tolist()
    assert seen == [(first[:2], [4, 5])] * 3 + [(first[2:], [6])] * 3  # float, asked, quantized


def test_every_step_of_both_models_is_told():
    told = []
    sample_pairs(_half, _half, SPEC, _noise(5), [], batch=2, seed=0, advance=lambda steps, message: told.append(steps))
    assert told == [1] * (2 * 5 * 3)
