import dataclasses

import pytest
import torch

from edadm_compile.errors import InputError, TargetError
from edadm_compile.runtime.artifact import write
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine
from edadm_compile.runtime.session import from_artifact, load
from tests.graphs import inputs_for


@pytest.fixture(scope="module")
def model(artifact):
    return from_artifact(artifact)


@pytest.fixture(scope="module")
def inputs(artifact):
    return inputs_for(artifact.lowered)


@pytest.mark.parametrize("engine", [None, "onnxruntime", "reference"])
def test_a_loaded_file_is_called_like_its_source(artifact, inputs, tmp_path, engine):
    write(artifact, tmp_path / "a.qmod")
    model = load(tmp_path / "a.qmod", engine=engine)
    assert model.engine_name == (engine or "onnxruntime")
    with torch.no_grad():
        expected = artifact.lowered(*inputs) if engine == "reference" else OnnxRuntimeEngine(artifact.qdq)(*inputs)
    x, t, label = inputs
    for result in (
        model(x, t, label),
        model(x, t, label=label),
        model(label=label, t=t, x=x),
        model.predict(x, t, label),
        model(x, t, label, return_dict=False),
    ):
        assert torch.equal(result, expected) and not result.requires_grad
    assert model.sampler.steps == 4 and [s.name for s in model.signature.inputs] == ["x", "t", "label"]


@pytest.mark.parametrize(
    "t", [50, 50.0, torch.tensor(50), torch.tensor([50]), torch.tensor([50, 50, 50]), torch.tensor([50.0] * 3)], ids=str
)
def test_timesteps_may_be_scalars(model, inputs, t):
    assert torch.equal(model(inputs[0], t, inputs[2]), model(inputs[0], torch.full((3,), 50), inputs[2]))


def test_diffusers_models_return_their_output_object(artifact, inputs):
    lowered = dataclasses.replace(
        artifact.lowered, signature=dataclasses.replace(artifact.lowered.signature, output="sample")
    )
    model = from_artifact(dataclasses.replace(artifact, lowered=lowered))
    plain = model.predict(*inputs)
    found = model(*inputs)
    assert torch.equal(found.sample, plain) and torch.equal(found[0], plain)
    (value,) = model(*inputs, return_dict=False)
    assert torch.equal(value, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[:, :2], t, c), r"'x': got shape \[3, 2, 8, 8\], expected \[3, 3, 8, 8\]"),
        (lambda x, t, c: (x[0], t, c), "'x'"),
        (lambda x, t, c: (x[:, :, :4], t, c), "'x'"),
        (lambda x, t, c: (x.sum(), t, c), r"'x': got shape \[\]"),
        (
            lambda x, t, c: (x.repeat(1, 1, 2, 2), t, c),
            "'x': shape 3,16,16 was not compiled; the file has 3,8,8: take .* with --shape 3,8,8 --shape 3,16,16",
        ),
        (lambda x, t, c: (x[:0], t[:0], c[:0]), "B at least 1"),
        (lambda x, t, c: ("noise", t, c), "'x': got str"),
        (lambda x, t, c: (x, t[:2], c), r"'t': got shape \[2\], expected \[3\]"),
        (lambda x, t, c: (x, t[:, None].expand(3, 2), c), "'t'"),
        (lambda x, t, c: (x, t, c[:2]), "'label'"),
        (lambda x, t, c: (x, t), "'label' is missing"),
        (lambda x, t, c: (x, t, None), "'label' is missing"),
        (lambda x, t, c: (x,), "'t' is missing"),
        (lambda x, t, c: (x, t, c, c), "got 4 positional inputs"),
    ],
)
def test_wrong_inputs_are_explained(model, inputs, change, message):
    with pytest.raises(InputError, match=message):
        model(*change(*inputs))


def test_wrong_keywords_are_explained(model, inputs):
    x, t, label = inputs
    with pytest.raises(InputError, match="'mask' was not compiled in"):
        model(x, t, label, mask=x)
    with pytest.raises(InputError, match="'label' was given twice"):
        model(x, t, label, label=label)
    assert model(x, t, label, mask=None).shape == x.shape  # an optional argument left at its default


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_large_batches_are_sliced(artifact, limit):
    inputs = inputs_for(artifact.lowered, batch=7)
    whole = from_artifact(artifact).predict(*inputs)
    lowered = dataclasses.replace(
        artifact.lowered, signature=dataclasses.replace(artifact.lowered.signature, max_batch=limit)
    )
    sliced = from_artifact(dataclasses.replace(artifact, lowered=lowered)).predict(*inputs)
    # A code on a rounding tie may flip between batch sizes in float layers; everything else is the same integer arithmetic.
    assert sliced.shape == whole.shape
    assert float((sliced - whole).abs().max()) <= 0.05 * float(whole.abs().max())


def test_unknown_engines_and_devices_are_refused(artifact):
    with pytest.raises(InputError, match="engine: got 'fast', on cpu allowed onnxruntime, reference"):
        from_artifact(artifact, engine="fast")
    for device in ("tpu", "meta"):
        with pytest.raises(InputError, match=f"device: got '{device}', allowed cpu, cuda"):
            from_artifact(artifact, device=device)
    expected = "no GPU code" if torch.cuda.is_available() else "no CUDA GPU"
    with pytest.raises(TargetError, match=expected):
        from_artifact(artifact, device="cuda")


def test_a_compiled_unet_takes_its_place_in_a_diffusers_pipeline():
    """Loaded instead of the original: same images from the same noise, up to 8-bit codes."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    from edadm_compile.config import QuantConfig
    from edadm_compile.driver.compile import to_artifact
    from edadm_compile.pipeline import compile_source
    from edadm_compile.runtime.artifact import Artifact
    from edadm_compile.runtime.session import from_artifact
    from tests.graphs import source_of
    from tests.lowering.plans import QUICK

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    config = QuantConfig(**{**QUICK, "weight_bits": 8})
    result = compile_source(source_of(unet, (3, 8, 8), 2), config, quality=False)
    artifact = to_artifact(result)
    assert isinstance(artifact, Artifact)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(num_train_timesteps=100))
    pipe.set_progress_bar_config(disable=True)

    def images():
        generator = torch.Generator().manual_seed(3)
        return pipe(batch_size=2, generator=generator, num_inference_steps=2, output_type="np").images

    original = images()
    pipe.unet = from_artifact(artifact)
    assert pipe.unet.config.sample_size == 8 and pipe.unet.config.in_channels == 3
    compiled = images()
    assert compiled.shape == original.shape and 0 < abs(compiled - original).max() < 0.25
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = pipe.unet.config.nothing
