"""The GPU benchmarks as dry runs on the CPU: what they would run, check and write; no time in here means anything."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.gpu import ceilings, check, cold_start, compiled_baselines, end_to_end, run, shapes, targets, widths
from edadm_compile.driver import contenders
from edadm_compile.driver.machine import Cpu
from edadm_compile.driver.single_launch import ReferenceRunner
from edadm_compile.driver.synthetic import Settings

FOLDER = Path(run.__file__).parent


def weights(module):
    """Elements of the weights of convolutions and linear layers."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


def sdxl():
    import diffusers

    cross = "CrossAttnDownBlock2D"
    return diffusers.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), down_block_types=("DownBlock2D", cross, cross),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    )  # fmt: skip


def test_tables_hold_every_weight_of_the_real_models():
    import diffusers

    with torch.device("meta"):
        models = {
            "ddim-cifar10": diffusers.UNet2DModel(**end_to_end.CONFIGS["cifar10"]),
            "sd15": diffusers.UNet2DConditionModel(**end_to_end.CONFIGS["sd15"]),
            "sdxl": sdxl(),
        }
    for name, model in models.items():
        assert sum(s.weights * count for s, count in shapes.table(name).items()) == weights(model), name


@pytest.mark.parametrize(("name", "millions"), [("ldm4-lsun", 274), ("ldm4-imagenet", 401)])
def test_tables_of_latent_diffusion_have_the_published_size(name, millions):
    found = sum(s.weights * count for s, count in shapes.table(name).items()) / 1e6
    assert found == pytest.approx(millions, rel=0.005)


def test_convolutions_of_cifar10_are_those_of_the_model():
    """Shapes seen by hooks in a real forward pass, not only their total."""
    import diffusers

    model, seen = diffusers.UNet2DModel(**end_to_end.CONFIGS["cifar10"]), {}

    def note(module, inputs, output):
        if module.kernel_size != (1, 1):
            key = (module.in_channels, module.out_channels, output.shape[-1], module.stride[0])
            seen[key] = seen.get(key, 0) + 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), 0)
    table = {}
    for shape, count in shapes.table("ddim-cifar10").items():
        if isinstance(shape, shapes.Conv):
            size = shape.height * shape.upsample // shape.stride
            key = (shape.channels, shape.outputs, size, shape.stride)
            table[key] = table.get(key, 0) + count
    assert table == seen


def test_run_checks_times_and_writes_every_shape(tmp_path):
    run.main(["--dry-run", "--batch", "1,2", "--out", str(tmp_path / "a" / "shapes.json")])
    result = json.loads((tmp_path / "a" / "shapes.json").read_text())
    assert result["dry_run"] and [m["batch"] for m in result["models"]] == [1, 2]
    for model in result["models"]:
        assert model["not_reached"] == 0 and len(model["rows"]) == len(shapes.table("tiny"))
        assert set(model["totals"]) == {"w8", "w4", "fp16"}
        for row in model["rows"]:
            names = ["w8", "w4"] if row["kind"] in ("Conv", "Linear") else ["fp16 in"]
            assert all("us" in row[name] and "failed" not in row[name] for name in [*names, "fp16"]), row


def test_no_time_is_left_is_no_shape(tmp_path):
    run.main(["--dry-run", "--batch", "1", "--seconds", "0", "--out", str(tmp_path / "shapes.json")])
    assert not (tmp_path / "shapes.json").exists()
    done = run.run_model("tiny", Settings(""), ReferenceRunner(run.FakeClock()), lambda: True)
    assert done["rows"] == [] and done["not_reached"] == len(shapes.table("tiny"))


class Wrong(ReferenceRunner):
    """Adds one unit in one place of an output."""

    def bind(self, memory):
        call, launch = super().bind(memory), memory.plan.launches[0]

        def spoiled():
            call()
            value = memory.view(launch.operands[launch.writes[0]]).reshape(-1)[5:6]
            value += 0.5 if launch.kernel in ("groupnorm", "attention_float") else 1

        return spoiled


@pytest.mark.parametrize(
    "shape",
    [
        shapes.Conv(20, 24, 7, 5), shapes.Conv(16, 8, 6, 6, stride=2), shapes.Conv(40, 16, 3, 4, upsample=2),
        shapes.Linear(9, 33, 20), shapes.Norm(32, 30, 8), shapes.Attention(9, 5, 2, 16),
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_kernel_gets_no_time(shape):
    settings = Settings("", 2)
    made = run.variants(shape, settings)
    right = run.measure(shape, 1, settings, ReferenceRunner(run.FakeClock()), made)
    wrong = run.measure(shape, 1, settings, Wrong(run.FakeClock()), made)
    for name in made:
        assert "us" in right[name] and "failed" not in right[name]
        assert "us" not in wrong[name] and "differs" in wrong[name]["failed"]
    assert "fp16" not in wrong


def test_exact_products_are_those_of_a_plain_convolution():
    from edadm_compile.driver.single_launch import fill
    from edadm_compile.kernels.memory import Memory
    from edadm_compile.quant import packing

    made = run.build(shapes.Conv(20, 24, 7, 5, stride=2), Settings("", 2), 4)
    memory = Memory(made.plan, made.tensors.__getitem__, "cpu")
    fill(memory)
    x = memory.view(made.launch.operands["x"]).double()
    weight = packing.unpack(made.tensors["w"], 4, (24, 20, 3, 3)).double()
    expected = nn.functional.conv2d(x, weight, stride=2, padding=1).permute(0, 2, 3, 1).reshape(-1, 24)
    assert torch.equal(check.accumulators(made, memory), expected)


def test_ceilings(tmp_path):
    ceilings.main(["--dry-run", "--out", str(tmp_path / "ceilings.json")])
    found = json.loads((tmp_path / "ceilings.json").read_text())
    best = max(rate for rate in found["int8_candidates"].values() if rate is not None)
    assert found["int8_operations_per_second"] == best and found["microseconds_per_graph_node"] == 1


def test_end_to_end_and_cold_start(tmp_path):
    artifact, out = tmp_path / "tiny.qmod", tmp_path / "e2e.json"
    end_to_end.main(["--dry-run", "--batch", "2", "--keep", str(artifact), "--out", str(out)])
    result = json.loads(out.read_text())
    (group,) = result["batches"]
    assert {row["contender"] for row in group["rows"]} == {
        "onnxruntime", "reference", "eager fp32", "channels_last fp32",
    }  # fmt: skip
    assert all("microseconds" in row for row in group["rows"]) and result["bits"] == 4
    for way in ("ours", "eager"):
        found = cold_start.child(way, "tiny", artifact, "cpu", 0.0)
        assert 0 < found["load_to_first_output"] < 60
    assert "longer than" in cold_start.measure("ours", "tiny", artifact, "cpu", 0.01)["failed"]
    found = widths.measure({"w8": artifact, "w4": artifact}, (1, 2), 2, Cpu())
    assert [row["batch"] for row in found["batches"]] == [1, 2]
    assert (
        found["batches"][0]["w8"]["ratio"]["median"] == 1 and found["batches"][0]["w4"]["microseconds"]["rounds"] == 2
    )
    assert found["bytes"]["w4"]["file"] == artifact.stat().st_size


def test_baselines_made_ready_are_those_that_are_measured(tmp_path, monkeypatch):
    artifact, out, jobs = tmp_path / "tiny.qmod", tmp_path / "e2e.json", tmp_path / "jobs.json"
    eager, compiled = "eager fp32", compiled_baselines.NAMES["max-autotune"]
    rows = {eager: contenders.BASELINES["cpu"][eager], compiled: ("without a compiler", torch.float32, True, "")}
    monkeypatch.setitem(contenders.BASELINES, "cpu", rows)
    end_to_end.compile_model("tiny", end_to_end.source("tiny"), artifact, (1,), (), 8)
    done = compiled_baselines.child("tiny:2:max-autotune", artifact, "cpu")
    jobs.write_text(json.dumps({"jobs": {"tiny:2:max-autotune": done, "tiny:1:max-autotune": {"failed": "not ready"}}}))
    for batches in ("1", "2"):
        end_to_end.main(
            ["--dry-run", "--model", "tiny", "--batch", batches, "--ready", str(jobs), "--keep", str(artifact), "--out", str(out)]
        )  # fmt: skip
        (group,) = json.loads(out.read_text())["batches"]
        names = {row["contender"] for row in group["rows"]}
        assert eager in names and (compiled in names) == (batches == "2")


def test_a_baseline_that_is_late_or_dies_is_not_ready(tmp_path):
    out, missing = tmp_path / "jobs.json", {"tiny": tmp_path / "missing.qmod"}
    found = compiled_baselines.run(["tiny:1:max-autotune"], missing, 120, out, "cpu")
    assert "missing.qmod" in found["tiny:1:max-autotune"]["failed"]
    found = compiled_baselines.run(["tiny:1:max-autotune"], missing, 0.01, out, "cpu")
    assert "not ready after" in found["tiny:1:max-autotune"]["failed"]
    assert compiled_baselines.ready(out, "tiny", 1) == []


def test_the_script_is_valid_and_names_only_modules_that_exist():
    script = FOLDER / "measure.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    lines = [line.split() for line in script.read_text().splitlines() if line.strip().startswith("run ")]
    used = {"ceilings", "run", "end_to_end", "cold_start", "compiled_baselines", "widths"}
    assert {words[2] for words in lines} == used
    assert all((FOLDER / f"{words[2]}.py").exists() for words in lines)
    for part in re.split(r"(?:models|prepared)\)\n", script.read_text()):
        limits = [int(line.split()[1]) + 10 for line in part.splitlines() if line.strip().startswith("run ")]
        assert 0 < sum(limits) <= 590  # a call is stopped after ten minutes


def test_targets_report_each_kernel_at_its_best_right_tile(tmp_path):
    targets.main(["--dry-run", "--out", str(tmp_path / "targets.json")])
    result = json.loads((tmp_path / "targets.json").read_text())
    assert [s["group"] for s in result["shapes"]] == [group for group, _, _ in targets.TINY]
    for shape, rows in zip(result["shapes"], result["candidates"], strict=True):
        assert not shape["failed"] and all("us" in row for row in rows)
        for bits in {row["bits"] for row in rows}:
            entry = shape[f"portable w{bits}" if bits else "portable"]
            assert entry["us"] == min(row["us"] for row in rows if row["bits"] == bits)


def test_targets_time_nothing_that_is_wrong(tmp_path):
    runner = Wrong(run.FakeClock())
    targets.run(targets.TINY[:1], "", runner, {"ceilings": {"int8_operations_per_second": 1.0}}, tmp_path / "t.json")
    (shape,), (rows,) = (json.loads((tmp_path / "t.json").read_text())[name] for name in ("shapes", "candidates"))
    assert rows and not any("us" in row for row in rows)
    assert all("out_q differs from the exact products in 1 of" in row["failed"] for row in rows)
    assert len(shape["failed"]) == len(rows)
    assert not any(name.startswith("portable") for name in shape)


def test_candidates_hold_both_kernels_of_sm_90():
    found = targets.candidates([s for s in targets.SHAPES if s[0] == "conv"][:1], "sm_90")
    assert {(c.path, c.bits) for c in found} == {
        (path, bits) for path in (targets.PORTABLE, targets.ASYNCHRONOUS) for bits in (8, 4)
    }
    for candidate in found:
        launch = candidate.made.launch
        assert launch.tile == candidate.tile and launch.kernel.endswith("_sm90") == (
            candidate.path == targets.ASYNCHRONOUS
        )
        assert launch.writes[0] == "out_q" and "out" not in launch.operands
