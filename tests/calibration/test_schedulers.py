"""Every supported scheduler steps as in a plain diffusers loop, with and without guidance."""

import dataclasses
import json

import diffusers
import pytest
import torch

from edadm_compile.calibration import sampler, schedulers
from edadm_compile.calibration.collect import collect
from edadm_compile.errors import InputError
from edadm_compile.frontend import LoadOptions, load_source, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.canonicalize import Canonicalize
from edadm_compile.passes.time_tables import FoldTimePath
from edadm_compile.pipeline import capture
from tests.graphs import assert_close, small_config

BASE = {"num_train_timesteps": 100, "beta_schedule": "linear"}
STEPS = 6
NULL = torch.tensor(7.0)
#: Prediction types that diffusers refuses for a class.
REFUSED = {
    ("PNDMScheduler", "sample"), ("EulerAncestralDiscreteScheduler", "sample"),
}  # fmt: skip
CASES = [
    (name, kind)
    for name in schedulers.SUPPORTED
    for kind in ("epsilon", "v_prediction", "sample")
    if (name, kind) not in REFUSED
]


#: Classes whose step draws noise.
NOISY = {"DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"}


def _config(name, **changes):
    return {"_class_name": name, **BASE, **changes}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _model(x, t, c):
    return torch.tanh(0.3 * x + 0.01 * t.float()[:, None, None, None] + 0.2 * c[:, None, None, None])


def _plain_loop(config, x, c, guidance, eta=0.0, model=_model, steps=STEPS):
    """As in diffusers' pipelines; also returns the input of every call of the model."""
    kept = {k: v for k, v in config.items() if k != "_class_name"}
    scheduler = getattr(diffusers, config["_class_name"]).from_config(kept)
    scheduler.set_timesteps(steps)
    extra = {"generator": _generator(3)} if config["_class_name"] in NOISY else {}
    extra |= {"eta": eta} if eta else {}
    latents, seen = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        latent_model_input = torch.cat([latents] * 2) if guidance is not None else latents
        latent_model_input = scheduler.scale_model_input(latent_model_input, t)
        both = torch.cat([NULL.to(c.dtype).expand_as(c), c]) if guidance is not None else c
        prediction = model(latent_model_input, t.repeat(latent_model_input.shape[0]), both)
        if guidance is not None:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + guidance * (cond - uncond)
        seen.append(latent_model_input)
        latents = scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
    return latents, seen


def _inputs():
    return torch.randn(3, 2, 4, 4, generator=_generator()), torch.tensor([0.0, 0.1, 0.2])


@pytest.mark.parametrize("guidance", [None, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_sampling_is_the_plain_diffusers_loop(name, kind, guidance):
    config, (x, c) = _config(name, prediction_type=kind), _inputs()
    spec = SamplerSpec(config, STEPS) if guidance is None else SamplerSpec(config, STEPS, 0.0, guidance, (NULL,))
    calls = []
    ours = sampler.sample(_model, spec, x, [c], generator=_generator(3), hook=lambda i, t, s, p: calls.append(s))
    expected, seen = _plain_loop(config, x, c, guidance)
    assert torch.equal(ours, expected) and bool(torch.isfinite(ours).all())
    assert len(calls) == len(seen) == len(sampler.timesteps(spec))
    assert all(torch.equal(a, b) for a, b in zip(calls, seen, strict=True))


@pytest.mark.parametrize("name", sorted({name for name, _ in REFUSED}))
def test_a_prediction_type_that_the_scheduler_lacks_is_refused_before_any_work(name):
    with pytest.raises(InputError, match=f"{name} refuses its configuration: .*sample"):
        sampler.make_scheduler(SamplerSpec(_config(name, prediction_type="sample"), STEPS))


@pytest.mark.parametrize(
    "changes",
    [
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"skip_prk_steps": True},
        {"use_karras_sigmas": True},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    ids=lambda value: "_".join(map(str, value)),
)
def test_settings_of_a_scheduler_are_obeyed(changes):
    key = next(iter(changes))
    names = {"skip_prk_steps": "PNDMScheduler", "timestep_spacing": "EulerDiscreteScheduler"}
    config, (x, c) = _config(names.get(key, "DPMSolverMultistepScheduler"), **changes), _inputs()
    ours = sampler.sample(_model, SamplerSpec(config, STEPS, 0.0, 2.0, (NULL,)), x, [c], generator=_generator(3))
    noisy = NOISY | ({config["_class_name"]} if key == "algorithm_type" else set())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.calibration.test_schedulers.NOISY", noisy)
        expected, _ = _plain_loop(config, x, c, 2.0)
    assert torch.equal(ours, expected)
    plain = sampler.sample(_model, SamplerSpec(_config(config["_class_name"]), STEPS, 0.0, 2.0, (NULL,)), x, [c])
    assert not torch.equal(ours, plain)


def test_eta_adds_the_noise_of_ddim():
    config, (x, c) = _config("DDIMScheduler"), _inputs()
    noisy = sampler.sample(_model, SamplerSpec(config, STEPS, 1.0, 2.0, (NULL,)), x, [c], generator=_generator(3))
    assert torch.equal(noisy, _plain_loop(config, x, c, 2.0, eta=1.0)[0])
    assert not torch.equal(noisy, _plain_loop(config, x, c, 2.0)[0])


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
def test_a_learned_variance_reaches_ddpm_from_the_conditional_branch(guidance):
    config, (x, c) = _config("DDPMScheduler", variance_type="learned_range"), _inputs()

    def both(x, t, c):
        value = _model(x, t, c)
        return torch.cat((value, value.sin()), dim=1)

    def plain(x, t, c):  # the pipelines for such models guide the mean alone
        return both(x, t, c)

    spec = SamplerSpec(config, STEPS) if guidance is None else SamplerSpec(config, STEPS, 0.0, guidance, (NULL,))
    ours = sampler.sample(both, spec, x, [c], generator=_generator(3))
    scheduler = diffusers.DDPMScheduler.from_config({k: v for k, v in config.items() if k != "_class_name"})
    scheduler.set_timesteps(STEPS)
    state, generator = x, _generator(3)
    for t in scheduler.timesteps:
        prediction = plain(state, t.repeat(3), c)
        if guidance is not None:
            mean, base = prediction[:, :2], plain(state, t.repeat(3), NULL.expand(3))[:, :2]
            prediction = torch.cat((base + guidance * (mean - base), prediction[:, 2:]), dim=1)
        state = scheduler.step(prediction, t, state, generator=generator).prev_sample
    assert torch.equal(ours, state)
    with pytest.raises(InputError, match="needs a model that predicts 4 channels, this one predicts 2"):
        sampler.sample(_model, dataclasses.replace(spec, guidance=1.0), x, [c])


@pytest.mark.parametrize("name", schedulers.SUPPORTED)
def test_stopping_early_sees_the_calls_of_the_whole_run(name):
    spec, (x, c) = SamplerSpec(_config(name), STEPS, 0.0, 2.0, (NULL,)), _inputs()
    runs = []
    for stop in (None, 4):
        seen = []
        sampler.sample(
            _model,
            spec,
            x,
            [c],
            generator=_generator(3),
            hook=lambda i, t, s, p, to=seen: to.append(s),
            stop_after=stop,
        )
        runs.append(seen)
    assert len(runs[1]) == 4 and all(torch.equal(a, b) for a, b in zip(*runs, strict=False))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("PNDMScheduler", {}), ("PNDMScheduler", {"skip_prk_steps": True}), ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}),
     ("DPMSolverMultistepScheduler", {})],
    ids=["prk", "plms", "heun", "dpm"],
)  # fmt: skip
def test_calibration_samples_are_states_of_schedulers_with_memory(labelled_source, labelled_program, name, changes):
    """Each sample is the model's input at its call, on a trajectory that was advanced in another batch and stopped early."""
    config = _config(name, **changes)
    program = dataclasses.replace(labelled_program, sampler=SamplerSpec(config, STEPS))
    calls = len(sampler.timesteps(program.sampler))
    found = collect(program, small_config(calib_samples=2 * calls), _generator(5))
    again = _generator(5)
    for n in (3, 2 * calls):  # the scoring batch, then the samples
        noise = sampler.draw_noise(program.signature, n, again)
        (labels,) = sampler.draw_conditions(program.signature, n, again)
    order = torch.randperm(2 * calls, generator=again)
    with torch.no_grad():
        _, seen = _plain_loop(config, noise, labels, None, model=labelled_source.module)
    assert found.step.unique().numel() == calls > (STEPS if name in ("PNDMScheduler", "HeunDiscreteScheduler") else 0)
    expected = torch.stack(seen)[found.step, order]
    assert float((found.x - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.fixture(scope="module")
def captures(labelled_source):
    """The model captured with whole timesteps and with fractional ones, each by a sampler that gives such."""
    module = labelled_source.module
    names = {torch.int64: "DDIMScheduler", torch.float32: "EulerDiscreteScheduler"}
    return {
        dtype: capture(
            source_from_module(module, SamplerSpec(_config(name), STEPS), shape=(3, 8, 8), num_classes={"label": 5})
        )
        for dtype, name in names.items()
    }


def test_models_are_captured_with_float_timesteps_where_the_scheduler_gives_such(captures):
    assert {dtype: program.signature.inputs[1].dtype for dtype, program in captures.items()} == {
        torch.int64: torch.int64, torch.float32: torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize("name", schedulers.SUPPORTED)
def test_the_timesteps_of_every_scheduler_are_rows_of_the_tables(labelled_source, captures, name):
    spec = SamplerSpec(_config(name), STEPS)
    times = torch.tensor(sampler.timesteps(spec), dtype=torch.float64)
    dtype = torch.int64 if bool((times == times.round()).all()) else torch.float32
    program = dataclasses.replace(captures[dtype].fork(), sampler=spec)
    program = run_passes(program, [Canonicalize(), FoldTimePath()], Context(small_config()))
    assert program.time is not None and torch.isin(times, program.time.keys).all()
    rows, position = program.time.lookup(times.to(dtype)), torch.searchsorted(program.time.keys, times)
    assert rows and all(torch.equal(rows[k], v[position]) for k, v in program.time.tables.items())
    x, labels = torch.randn(times.numel(), 3, 8, 8, generator=_generator()), torch.arange(times.numel()) % 5
    with torch.no_grad():
        t = times.to(dtype)
        assert_close(program(x, t, labels), labelled_source.module(x, t, labels))


@pytest.mark.parametrize("other", [n for n in schedulers.SUPPORTED if "Euler" not in n and "Heun" not in n])
def test_another_scheduler_than_the_compiled_one_takes_the_path(labelled_source, labelled_program, other):
    x, labels = torch.randn(2, 3, 8, 8, generator=_generator()), torch.tensor([1, 4])
    spec = SamplerSpec(_config(other), 7)
    results = [
        sampler.sample(model, spec, x, [labels], generator=_generator(3))
        for model in (labelled_program, labelled_source.denoiser())
    ]
    assert_close(*results, depth=4096)


def test_a_model_of_whole_timesteps_refuses_fractional_ones(labelled_source, labelled_program):
    x, labels = torch.randn(2, 3, 8, 8, generator=_generator()), torch.tensor([1, 4])
    spec = SamplerSpec(_config("EulerDiscreteScheduler"), STEPS)
    for model in (labelled_program, labelled_source.denoiser()):
        with pytest.raises(
            InputError, match=r"timestep: got 79\.2, this model takes whole ones; compile it with --scheduler"
        ):
            sampler.sample(model, spec, x, [labels])
    whole = SamplerSpec(_config("EulerDiscreteScheduler", timestep_spacing="leading"), STEPS)
    assert_close(
        sampler.sample(labelled_program, whole, x, [labels]), sampler.sample(labelled_source.denoiser(), whole, x, [labels]),
        depth=4096,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SamplerSpec({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4), "supported are DDIMScheduler, DDPMScheduler"),
        (SamplerSpec(_config("PNDMScheduler"), 3), 'steps: got 3, PNDMScheduler needs 4 or more, or "skip_prk_steps"'),
        (SamplerSpec(_config("PNDMScheduler"), 4, eta=0.5), "eta: got 0.5, PNDMScheduler has no such setting"),
        (SamplerSpec(_config("DDIMScheduler"), 4, eta=1.5), "eta: got 1.5, allowed 0"),
        (SamplerSpec(_config("DDIMScheduler"), 4, guidance=-1.0), "guidance: got -1, allowed is a finite scale"),
        (SamplerSpec(_config("DDIMScheduler"), 4, guidance=float("nan")), "guidance: got nan"),
        (SamplerSpec(_config("DDIMScheduler", steps_offset=1), 100), "reach 100, the schedule ends at 99"),
        (SamplerSpec(_config("LCMScheduler", original_inference_steps=5), 6), "LCMScheduler refuses its configuration"),
    ],
    ids=["unknown", "prk", "eta", "eta_range", "negative", "nan", "beyond", "lcm"],
)  # fmt: skip
def test_samplers_that_cannot_run_are_refused_in_words(spec, message):
    with pytest.raises(InputError, match=message):
        sampler.make_scheduler(spec)


def test_guidance_without_an_unconditional_branch_is_refused():
    with pytest.raises(InputError, match="guidance 2 needs the unconditional branch: give --null-label K"):
        sampler.sample(_model, SamplerSpec(_config("DDIMScheduler"), 4, guidance=2.0), *_inputs()[:1], [_inputs()[1]])


def test_pndm_without_a_number_of_steps_has_the_usual_fifty(tmp_path):
    (tmp_path / "pndm.json").write_text(json.dumps(_config("PNDMScheduler", num_train_timesteps=1000)))
    (tmp_path / "few.json").write_text(json.dumps(_config("PNDMScheduler", num_train_timesteps=20)))
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=2, add_attention=False,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    found = [load_source(tmp_path, LoadOptions(scheduler=tmp_path / f"{name}.json")) for name in ("pndm", "few")]
    assert [source.sampler.steps for source in found] == [50, 20]
