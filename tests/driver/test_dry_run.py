import json

import pytest
import torch
from click.testing import CliRunner

from edadm_compile.calibration.sampler import timesteps
from edadm_compile.cli import main
from edadm_compile.config import LayerRule
from edadm_compile.driver.compile import compile_model, to_artifact
from edadm_compile.driver.device_code import DeviceOptions
from edadm_compile.driver.dry_run import estimate
from edadm_compile.driver.outline import make_outline
from edadm_compile.errors import ConfigError
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.footprint import Footprint, rows_at_once
from edadm_compile.ir.valueless import has_values, without_values
from edadm_compile.passes.sensitivity import measured_rows
from edadm_compile.report.dry_run_tables import print_dry_run
from edadm_compile.report.truth import truth_table
from edadm_compile.runtime.artifact import expected_size, to_bytes
from tests.graphs import DDIM, GraphBuilder, TinyUNet, small_config, source_of


def _agree(plan, result):
    size = len(to_bytes(to_artifact(result)))
    assert plan["blocks"] == len(result.stats["reconstruct"]["units"])
    assert sum(plan["layers"].values()) == len(truth_table(result.lowered, result.config.name))
    assert plan["bytes"]["file"] == pytest.approx(size, rel=0.04)
    assert plan["average_weight_bits"] == pytest.approx(result.stats["assign_widths"]["average_bits"], abs=0.3)


def test_layers_blocks_and_size_are_those_of_the_compilation(labelled_source, compiled):
    _agree(estimate(labelled_source, compiled.config, DeviceOptions(())), compiled)


def test_the_measurement_of_output_codes_keeps_all_float_values_where_it_is_done():
    source = source_of(TinyUNet())
    mixed, uniform = (small_config(uniform=uniform) for uniform in (False, True))
    floats = make_outline(source, mixed).floats
    found, none = (estimate(source, c, DeviceOptions(()))["memory"] for c in (mixed, uniform))
    held = none["stages"]["output codes"]
    assert held == none["runtime"] + none["weights"]
    rows = measured_rows(len(timesteps(floats.sampler)), mixed.tdac.trajectories, 1)
    kept = found["stages"]["output codes"] - found["runtime"] - found["weights"]
    assert kept > Footprint(floats).total * rows > 0
    assert kept < 4 * Footprint(floats).total * rows + (1 << 20)


def test_a_memory_limit_moves_caches_to_disk(tmp_path):
    """As many bytes as the compilation then spills, to a fifth."""
    source, config = source_of(TinyUNet()), small_config(weight_bits=8)
    free, tight = (estimate(source, config, DeviceOptions(()), memory=m) for m in (None, 0))
    assert free["memory"]["spilled"] == 0
    assert tight["memory"]["stages"]["reconstruct"] < free["memory"]["stages"]["reconstruct"]
    made = compile_model(source, config, workdir=tmp_path, memory=0)
    assert tight["memory"]["spilled"] == pytest.approx(made.stats["reconstruct"]["caches"]["spilled_peak"], rel=0.2)
    _agree(free, made)


def test_the_expected_size_of_a_finished_artifact_is_its_size(artifact, data):
    assert abs(expected_size(artifact) - len(data)) <= 64  # names of types are two letters longer or shorter


def test_large_constants_lose_their_values_and_the_source_keeps_them():
    build = GraphBuilder()
    program = build.program(build.conv("a", build.conv("big", build.x, 4, 512), 512, 4))
    bare = without_values(program)
    assert not has_values(bare.graph_module.big.weight)
    assert has_values(bare.graph_module.big.bias)
    assert has_values(program.graph_module.big.weight)
    propagate_shapes(bare)
    assert [n.meta["shape"] for n in bare.graph_module.graph.nodes if n.op == "call_function"] == [
        (2, 512, 8, 8),
        (2, 4, 8, 8),
    ]


def test_a_footprint_counts_memory_once_and_frees_it():
    build = GraphBuilder(x=(4, 8, 8))
    first = build.op("aten.silu.default", build.x)
    view = build.op("aten.reshape.default", first, [-1, 256])
    second = build.op("aten.silu.default", view)
    third = build.op("aten.silu.default", second)
    found = Footprint(build.program(third))
    size = 4 * 256
    assert found.total == 3 * size
    assert found.peak == 2 * size
    assert found.made[view] == 0
    assert found.peak_of([view, second]) == size  # what comes from outside is not counted
    assert found.peak_of([first, view, second, third], lambda node: 10.0 * (node is third)) == 2 * size + 10
    assert found.peak_of([first, view, second, third], taken=lambda n: 3 * n) == 6 * size


def test_rows_at_once_follow_the_budget():
    build = GraphBuilder(x=(4, 8, 8))
    program = build.program(build.op("aten.silu.default", build.x))
    assert rows_at_once(program, 1 << 20, 16) == 16
    assert rows_at_once(program, 4 * 1024, 16) == 4
    assert rows_at_once(program, 1, 16) == 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of one level as a checkpoint dictionary."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.save(
        {
            "format": "edadm_compile.checkpoint/1",
            "model": {"class_name": "UNet2DModel", "config": dict(model.config)},
            "state_dict": model.state_dict(),
            "scheduler": dict(DDIM),
            "sampler": {"steps": 4},
        },
        path,
    )
    return path


def _compile(checkpoint, folder, *options):
    given = ["compile", str(checkpoint), "-q", "--json", "--targets", "none", "--iters", "2", "--calib-samples", "8"]
    result = CliRunner().invoke(
        main, [*given, "-o", str(folder / "unet.qmod"), "--workdir", str(folder / "w"), *options]
    )
    return result, json.loads(result.stdout) if result.exit_code == 0 else {}


def test_the_command_tells_what_the_compilation_then_does_and_writes_nothing(checkpoint, tmp_path, capsys):
    result, plan = _compile(checkpoint, tmp_path, "--dry-run")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    assert plan["resumed"] == [] and plan["seconds"]["reconstruct"] > 0
    result, summary = _compile(checkpoint, tmp_path)
    assert result.exit_code == 0, result.output
    assert plan["blocks"] == summary["blocks"]
    assert sum(plan["layers"].values()) == sum(summary["layers"].values())
    assert plan["bytes"]["file"] == pytest.approx(summary["bytes"]["file"], rel=0.05)
    assert plan["memory"]["peak"] >= plan["memory"]["runtime"] + plan["memory"]["weights"]
    assert plan["memory"]["weights"] >= 4 * plan["parameters"]

    result, rest = _compile(checkpoint, tmp_path, "--dry-run")  # all of it is in the working folder now
    assert sum(name.startswith("reconstruct.") for name in rest["resumed"]) == plan["blocks"]
    assert rest["seconds"] == {**rest["seconds"], "calibration": 0, "reconstruct": 0, "ranges": 0, "quality": 0}
    print_dry_run(rest)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"{plan['blocks']} to reconstruct" in text and "no GPU code" in text and "the time is that of the rest" in text
    )
    result, _ = _compile(checkpoint, tmp_path, "--dry-run", "--workdir", str(tmp_path))  # before capture
    assert result.exit_code != 0 and "is neither empty nor a working folder" in result.output
    result, _ = _compile(checkpoint, tmp_path, "--dry-run", "--seed", "7")
    assert result.exit_code != 0 and "holds an earlier compilation with other inputs" in result.output


def test_what_the_compilation_would_refuse_is_refused(labelled_source):
    with pytest.raises(ConfigError, match="no such layer"):
        estimate(labelled_source, small_config(rules=(LayerRule("no such layer", weight_bits=8),)), DeviceOptions(()))
