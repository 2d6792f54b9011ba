"""What the user says about guidance becomes the unconditional branch of the sampler, or a sentence."""

import json

import diffusers
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from edadm_compile import cli
from edadm_compile.errors import InputError
from edadm_compile.frontend import GuidanceOptions, LoadOptions, guided_sampler, load_source, source_from_module
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature
from edadm_compile.runtime.artifact import read
from tests.graphs import DDIM

PLAIN = SamplerSpec(DDIM, 4)
X, T = InputSpec("x", (3, 8, 8), torch.float32, "x"), InputSpec("t", (), torch.int64, "t")
LABEL = InputSpec("label", (), torch.int64, "cond", 5)
TEXT = InputSpec("text", (7, 4), torch.float32, "cond")


def _signature(*conditions):
    return Signature((X, T, *conditions), "tensor", 8)


def _guided(options, *conditions, sampler=PLAIN, model=None):
    return guided_sampler(sampler, _signature(*conditions), options, model)


class Labelled(nn.Module):
    """Four embeddings, and what models say about them."""

    def __init__(self, **says):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        for name, value in says.items():
            setattr(self, name, value)

    def forward(self, x, t, label):
        return x + self.embedding(label)[:, :, None, None]


def test_nothing_said_changes_nothing():
    assert _guided(GuidanceOptions(), LABEL) is PLAIN


@pytest.mark.parametrize(("said", "label"), [("2", 2), (3, 3), ("last", 4)])
def test_the_null_label(said, label):
    spec = _guided(GuidanceOptions(3, said), TEXT, LABEL)
    assert spec.guidance == 3.0 and spec.null[0] is None and int(spec.null[1]) == label
    assert spec.null[1].dtype == torch.int64 and spec.null[1].shape == ()


def test_zeros_are_for_float_conditions_and_go_with_a_label():
    spec = _guided(GuidanceOptions(2, 1, "zeros"), LABEL, TEXT)
    assert int(spec.null[0]) == 1 and torch.equal(spec.null[1], torch.zeros(7, 4))
    assert _guided(GuidanceOptions(2, None, "zeros"), LABEL, TEXT).null[0] is None


def test_a_file_gives_rows_by_name(tmp_path):
    path, row = tmp_path / "empty.safetensors", torch.randn(1, 7, 4)
    save_file({"text": row}, path)
    spec = _guided(GuidanceOptions(2, None, path), TEXT, LABEL)
    assert torch.equal(spec.null[0], row[0]) and spec.null[1] is None


def test_a_scale_alone_keeps_the_branch_that_is_there():
    spec = _guided(GuidanceOptions(2, 1), LABEL)
    again = _guided(GuidanceOptions(5), LABEL, sampler=spec)
    assert again.guidance == 5.0 and again.null == spec.null
    other = _guided(GuidanceOptions(None, 3), LABEL, sampler=spec)
    assert other.guidance == 2.0 and int(other.null[0]) == 3
    assert not _guided(GuidanceOptions(1), LABEL).guided


@pytest.mark.parametrize(
    ("says", "label"), [({"null_label": 0}, 0), ({"num_classes": 3}, 3), ({"null_class": 2, "num_classes": 3}, 2)]
)
def test_models_that_declare_their_null_label_need_no_option(says, label):
    source = source_from_module(
        Labelled(**says), PLAIN, shape=(3, 8, 8), num_classes={"label": 3}, guidance=GuidanceOptions(2)
    )
    assert int(source.sampler.null[0]) == label


@pytest.mark.parametrize(
    ("options", "conditions", "message"),
    [
        (GuidanceOptions(None, 1), [LABEL], "give its scale too: --guidance SCALE"),
        (GuidanceOptions(-1.0, 1), [LABEL], "--guidance: got -1, allowed"),
        (GuidanceOptions(float("inf"), 1), [LABEL], "--guidance: got inf, allowed"),
        (GuidanceOptions(2), [], "takes no condition, there is nothing to be guided by"),
        (GuidanceOptions(2), [LABEL], r"--guidance 2 needs the unconditional branch.*takes label \[\]"),
        (GuidanceOptions(2, 0), [InputSpec("y", (), torch.int64, "cond", 1)], "is the model's only label"),
        (GuidanceOptions(2, "ten"), [LABEL], "--null-label: got 'ten', expected a label"),
        (GuidanceOptions(2, 5), [LABEL], "--null-label: got 5, allowed is 0 to 4"),
        (GuidanceOptions(2, -1), [LABEL], "--null-label: got -1, allowed is 0 to 4"),
        (GuidanceOptions(2, "last"), [InputSpec("y", (), torch.int64, "cond")], "number of labels of 'y' is not known"),
        (GuidanceOptions(2, 1), [TEXT], r"takes no class label; it takes text \[7, 4\]"),
        (GuidanceOptions(2, None, "zeros"), [LABEL], "no condition of the model is a float tensor"),
        (GuidanceOptions(2, None, "nothing.safetensors"), [TEXT], "--uncond nothing.safetensors: not a readable"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_explained(options, conditions, message):
    with pytest.raises(InputError, match=message):
        _guided(options, *conditions)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompt": torch.zeros(1, 7, 4)}, "'prompt' is no condition of the model; it takes text"),
        ({"text": torch.zeros(2, 7, 4)}, r"shape \[2, 7, 4\], expected one row \[1, 7, 4\]"),
        ({"text": torch.zeros(1, 7, 4, dtype=torch.int64)}, "holds torch.int64, expected finite torch.float32"),
        ({"text": torch.full((1, 7, 4), float("nan"))}, "NaN or infinite values"),
        ({}, "the file holds no tensor"),
    ],
    ids=["name", "rows", "type", "nan", "empty"],
)
def test_files_that_do_not_fit_are_explained(tmp_path, tensors, message):
    path = tmp_path / "empty.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=message):
        _guided(GuidanceOptions(2, None, path), TEXT)


def test_a_null_label_that_the_model_does_not_know_is_found_by_calling_it():
    with pytest.raises(InputError, match=r"fails on the unconditional branch label=4 \(4 labels are known\): .*range"):
        source_from_module(Labelled(), PLAIN, shape=(3, 8, 8), num_classes={"label": 4}, guidance=GuidanceOptions(2, 4))


def test_fractional_timesteps_need_a_model_that_takes_them(tmp_path):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(100, 3)

        def forward(self, x, t):
            return x + self.rows(t)[:, :, None, None]

    spec = SamplerSpec({**DDIM, "_class_name": "EulerDiscreteScheduler"}, 5)
    with pytest.raises(
        InputError, match=r"Table cannot be called with fractional timesteps, and the scheduler gives 74\.25"
    ):
        source_from_module(Table(), spec, shape=(3, 8, 8))
    program = torch.export.export(Table().eval(), (torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)))
    torch.export.save(program, tmp_path / "table.pt2")
    (tmp_path / "scheduler.json").write_text(json.dumps(spec.scheduler))
    with pytest.raises(InputError, match=r"table\.pt2 takes whole timesteps, and the scheduler gives 74\.25"):
        load_source(tmp_path / "table.pt2", LoadOptions(scheduler=tmp_path / "scheduler.json", steps=5))


def _run(*arguments):
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_guidance_from_the_command_line(tmp_path, monkeypatch):
    """Compile and sample a text-conditional UNet of v_prediction with PLMS; the result is the float model's, rounded."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
        cross_attention_dim=12, attention_head_dim=4,
    )  # fmt: skip
    model.save_pretrained("text/unet")
    scheduler = {"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "skip_prk_steps": True}
    (tmp_path / "plms.json").write_text(json.dumps({**scheduler, "prediction_type": "v_prediction"}))
    save_file({"encoder_hidden_states": torch.randn(6, 7, 12)}, "cond.safetensors")
    save_file({"encoder_hidden_states": torch.randn(1, 7, 12)}, "empty.safetensors")
    shared = ("--cond", "cond.safetensors", "--scheduler", "plms.json", "--steps", 4)
    cheap = ("--w8a8", "--iters", 0, "--calib-samples", 6, "--targets", "none", "--quiet", "-o", "text.qmod")
    _run("text", *shared, *cheap, "--guidance", 2, "--uncond", "empty.safetensors")
    loaded = read(tmp_path / "text.qmod")
    assert loaded.lowered.sampler.guidance == 2 and loaded.lowered.sampler.null[0].shape == (7, 12)
    assert sum(loaded.manifest["allocation"]) == 6 and len(loaded.manifest["allocation"]) == 5  # PLMS calls once more
    images = []
    for extra in (("--reference", "text"), ("--guidance", 1), ("--uncond", "zeros")):
        name = f"{len(images)}.png"
        where = ("-o", name, "--engine", "reference", "--json")
        found = json.loads(_run("sample", "text.qmod", "-n", 4, *shared[:2], *extra, *where))
        assert found["scheduler"] == "PNDMScheduler" and found.get("psnr_db", {"worst": 99})["worst"] > 20
        images.append((tmp_path / name).read_bytes())
    assert len(set(images)) == 3
    assert "guidance 2 against encoder_hidden_states" in _run("inspect", "text.qmod")


def test_a_file_without_guidance_can_be_used_with_it(data, tmp_path, monkeypatch):
    """It needs an unconditional branch, and the command says that calibration did not have one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.qmod").write_bytes(data)
    sampled = ("sample", "f.qmod", "-n", 6, "--engine", "reference", "--json", "--guidance", 2)
    failed = CliRunner().invoke(cli.main, list(map(str, sampled)))
    assert failed.exit_code == 2 and "needs the unconditional branch" in failed.output
    pictures = []
    for label in ("last", 0):
        found = json.loads(_run(*sampled, "--null-label", label, "--eta", 1))
        assert found["guidance"] == 2 and "calibrated without guidance" in found["note"]
        pictures.append((tmp_path / "grid.png").read_bytes())
    assert pictures[0] != pictures[1]
    failed = CliRunner().invoke(cli.main, [*map(str, sampled), "--null-label", "5"])
    assert failed.exit_code == 2 and "--null-label: got 5, allowed is 0 to 4" in failed.output
