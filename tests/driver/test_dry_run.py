import json

import pytest
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.device_code import DeviceOptions
from edadm_compile.driver.dry_run import estimate
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.footprint import Footprint, rows_at_once
from edadm_compile.ir.valueless import has_values, without_values
from edadm_compile.pipeline import compile_source
from edadm_compile.report.truth import truth_table
from edadm_compile.runtime.artifact import expected_size, to_bytes
from tests.graphs import GraphBuilder, TinyUNet, small_config, source_of


@pytest.mark.parametrize("changes", [{}, {"weight_bits": 8}, {"uniform": True, "attention": "int8"}])
def test_layers_blocks_and_size_are_those_of_the_compilation(changes):
    source = source_of(TinyUNet(width=32, classes=5), num_classes={"label": 5})
    config = small_config(**changes)
    plan = estimate(source, config, DeviceOptions(()))
    result = compile_source(source, config)
    size = len(to_bytes(to_artifact(result)))
    assert plan["blocks"] == len(result.stats["reconstruct"]["units"])
    assert sum(plan["layers"].values()) == len(truth_table(result.lowered, config.name))
    assert plan["bytes"]["file"] == pytest.approx(size, rel=0.04)
    assert plan["average_weight_bits"] == pytest.approx(result.stats["assign_widths"]["average_bits"], abs=0.3)


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


def test_rows_at_once_follow_the_budget():
    build = GraphBuilder(x=(4, 8, 8))
    program = build.program(build.op("aten.silu.default", build.x))
    assert rows_at_once(program, 1 << 20, 16) == 16
    assert rows_at_once(program, 4 * 1024, 16) == 4
    assert rows_at_once(program, 1, 16) == 1


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path):
    out = tmp_path / "unet.qmod"
    given = ["compile", "examples/digits/model.pt", "--w4a8", "--targets", "none", "-o", str(out)]
    result = CliRunner().invoke(main, [*given, "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert not out.exists()
    assert plan["blocks"] == 20
    assert 0.9 < plan["bytes"]["file"] / 880_000 < 1.1
    assert plan["memory"]["peak"] >= plan["memory"]["weights"] > 4 * plan["parameters"] - 1
