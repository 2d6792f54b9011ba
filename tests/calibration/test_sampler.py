import json

import diffusers
import pytest
import torch

from edadm_compile.calibration import sampler
from edadm_compile.calibration.schedulers import step_output
from edadm_compile.errors import InputError
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature
from tests.graphs import DDIM


def _signature(*conditions):
    return Signature(
        (InputSpec("x", (2, 3, 3), torch.float32, "x"), InputSpec("t", (), torch.int64, "t"), *conditions), "tensor", 8
    )


def _generator():
    return torch.Generator().manual_seed(0)


def test_labels_are_balanced_and_shuffled():
    spec = InputSpec("label", (), torch.int64, "cond", num_classes=10)
    (labels,) = sampler.draw_conditions(_signature(spec), 40, _generator())
    assert labels.dtype == torch.int64 and labels.bincount(minlength=10).tolist() == [4] * 10
    assert labels.tolist() != (torch.arange(40) % 10).tolist()


def test_rows_of_a_pool_stay_together():
    specs = [InputSpec(name, (4,), torch.float32, "cond") for name in ("a", "b")]
    pool = {"a": torch.arange(6.0)[:, None].expand(6, 4), "b": torch.arange(6.0)[:, None].expand(6, 4) * 10}
    a, b = sampler.draw_conditions(_signature(*specs), 50, _generator(), pool)
    assert torch.equal(a * 10, b) and len(a[:, 0].unique()) > 3


def test_a_condition_without_values_is_refused():
    with pytest.raises(InputError, match=r"'text'.*--cond"):
        sampler.draw_conditions(_signature(InputSpec("text", (7, 5), torch.float32, "cond")), 3, _generator())


@pytest.mark.parametrize("name", ["NoSuchScheduler", "", "UNet2DModel", "__import__"])
def test_an_unknown_scheduler_is_refused(name):
    with pytest.raises(InputError, match="_class_name"):
        sampler.make_scheduler(SamplerSpec({"_class_name": name}, 10))


@pytest.mark.parametrize("steps", [0, -1, 101])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(InputError, match="allowed 1 to 100"):
        sampler.make_scheduler(SamplerSpec(DDIM, steps))


def test_a_bad_scheduler_setting_is_refused():
    with pytest.raises(InputError, match="DDIMScheduler refuses"):
        sampler.make_scheduler(SamplerSpec({**DDIM, "beta_schedule": "nonsense"}, 10))


def test_scheduler_files(tmp_path):
    path = tmp_path / "scheduler_config.json"
    with pytest.raises(InputError, match="cannot read"):
        sampler.read_scheduler(path)
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        sampler.read_scheduler(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="_class_name"):
        sampler.read_scheduler(path)
    path.write_text(json.dumps(DDIM))
    assert sampler.read_scheduler(path) == DDIM


def test_timesteps_are_those_of_the_scheduler():
    assert sampler.timesteps(SamplerSpec(DDIM, 4)) == [75.0, 50.0, 25.0, 0.0]
    assert sampler.schedule_length(SamplerSpec(DDIM, 4)) == 100


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]
)
def test_sampling_is_the_plain_diffusers_loop(name):
    config = {"_class_name": name, "num_train_timesteps": 100, "beta_schedule": "linear"}

    def model(x, t, c):
        return 0.1 * x + 0.001 * t.float()[:, None, None, None] + c[:, None, None, None]

    x, c = torch.randn(3, 2, 4, 4, generator=_generator()), torch.tensor([0.0, 0.1, 0.2])
    ours = sampler.sample(model, SamplerSpec(config, 5), x, [c], generator=_generator())
    scheduler = getattr(diffusers, name).from_config({k: v for k, v in config.items() if k != "_class_name"})
    scheduler.set_timesteps(5)
    state, generator = x * scheduler.init_noise_sigma, _generator()
    extra = {"generator": generator} if name == "DDPMScheduler" else {}
    for t in scheduler.timesteps:
        prediction = model(scheduler.scale_model_input(state, t), t.repeat(3), c)
        state = scheduler.step(prediction, t, state, **extra).prev_sample
    assert torch.equal(ours, state)


def test_hooks_see_every_step_and_sampling_can_stop_early():
    seen = []
    x = torch.randn(2, 1, 3, 3, generator=_generator())
    result = sampler.sample(
        lambda x, t: x * 0, SamplerSpec(DDIM, 4), x, hook=lambda i, t, s, p: seen.append((i, t)), stop_after=2
    )
    assert seen == [(0, 75.0), (1, 50.0)] and bool(torch.isfinite(result).all())


def test_a_prediction_of_another_shape_is_explained():
    with pytest.raises(InputError, match=r"predicts \[2, 1, 6, 6\] for x \[2, 1, 3, 3\]"):
        sampler.sample(lambda x, t: torch.zeros(2, 1, 6, 6), SamplerSpec(DDIM, 4), torch.zeros(2, 1, 3, 3))


def test_learned_variance_is_cut_off():
    x = torch.zeros(1, 3, 2, 2)
    scheduler = sampler.make_scheduler(SamplerSpec(DDIM, 4))
    assert step_output(scheduler, torch.ones(1, 6, 2, 2), x).shape == (1, 3, 2, 2)
    assert step_output(scheduler, torch.ones(1, 3, 2, 2), x).shape == (1, 3, 2, 2)
