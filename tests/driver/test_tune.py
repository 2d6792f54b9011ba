"""The search for tiles with invented times, and its checks on the reference kernels."""

import json

import pytest
import torch
from click.testing import CliRunner

from edadm_compile import cli
from edadm_compile.driver import bench, device_code, fp16_times, machine, single_launch, tune, tune_search
from edadm_compile.driver.single_launch import ReferenceRunner
from edadm_compile.driver.tune_search import search, shapes_of, shortlist
from edadm_compile.errors import TargetError
from edadm_compile.kernels import aot, tiles
from edadm_compile.kernels.aot_cache import Cache, default_cache
from edadm_compile.kernels.registry import kernel
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from edadm_compile.passes.base import Silent
from edadm_compile.report import bench_tables
from edadm_compile.runtime.artifact import read, write
from tests.driver.test_bench import Ticks
from tests.lowering.plans import inputs_of, run


@pytest.fixture(scope="module")
def shapes(artifact):
    return shapes_of(artifact.lowered, [Target("", 2)])


def find(shapes, measure, **options):
    return search(shapes, measure, progress=Silent(), **options)


def test_every_distinct_matrix_shape_has_its_candidates(artifact, shapes):
    plan = make_plan(artifact.lowered, Target("", 2))
    keys = [tune_search.key_of(launch) for launch in plan.launches if launch.kernel in tune_search.TUNED]
    assert sorted(keys) == sorted(shape.key for shape in shapes for _ in range(shape.count))
    for shape in shapes:
        tried = [shape.tile(i) for i in range(len(shape.candidates))]
        assert tried == shortlist(shape.candidates[0].launches[0], "")
        assert len({str(tile) for tile in tried}) == len(tried) > 1
        for candidate in shape.candidates:
            (launch,) = candidate.launches
            assert tune_search.key_of(launch) == shape.key
            assert {str(o.key) for o in launch.operands.values() if o.space == "constant"} == set(candidate.constants)
            assert ("partial" in launch.operands) == (launch.tile.sizes["SPLIT_K"] > 1)
    assert any(tile.sizes["SPLIT_K"] > 1 for s in shapes for tile in [s.tile(i) for i in range(len(s.candidates))])


def test_the_fastest_wins_and_the_built_in_choice_wins_ties(shapes):
    planted = {shape.key: shape.tile(len(shape.candidates) - 1) for shape in shapes[1:]}

    def measure(plan):
        launch = plan.launches[0]
        return 5.0 if planted.get(tune_search.key_of(launch)) == launch.tile else 10.0

    found = find(shapes, measure)
    assert found.best[shapes[0].key] == 0 and found.tiles(shapes[1:]) == planted
    assert not found.untried and not found.stopped and not found.rejected
    table = json.loads(json.dumps(tune.to_table("sm_90", shapes, found)))
    assert tiles.parse_table(table) == found.tiles(shapes)
    for shape in shapes[1:]:
        launch = shape.candidates[0].launches[0]
        values = {**launch.constants, **launch.scalars}
        assert tiles.choose(launch.kernel, values, "sm_90", tiles.parse_table(table)) == planted[shape.key]
        assert table["microseconds"][shape.key] == {"built_in": 10, "best": 5, "tried": len(shape.candidates)}
    counts = [shape.count for shape in shapes]
    assert table["step_microseconds"] == {"built_in": 10 * sum(counts), "best": 5 * sum(counts) + 5 * counts[0]}


def test_a_plan_with_the_tiles_found_computes_the_same(artifact, shapes):
    """Whatever was chosen, the plan that is written has to be right."""
    slowest_first = {shape.key: i for i, shape in enumerate(shapes)}
    found = find(shapes, lambda plan: 1.0 / (1 + slowest_first[tune_search.key_of(plan.launches[0])]) - _rank(plan))
    program = artifact.lowered
    chosen = found.tiles(shapes)
    plan = make_plan(program, Target("", 2, torch.float32, exact=True, tiles=chosen))
    for launch in plan.launches:
        if launch.kernel in tune_search.TUNED:
            assert launch.tile == chosen[tune_search.key_of(launch)]
    inputs = inputs_of(program, 2)
    with torch.no_grad():
        assert torch.equal(run(program, plan, inputs), program(*inputs))


def _rank(plan):
    tile = plan.launches[0].tile
    return tile.sizes["SPLIT_K"] * 10 + tile.sizes["BLOCK_M"] + tile.num_stages


def test_candidates_that_fail_are_left_out(shapes):
    first, second = shapes[0], shapes[1]

    def measure(plan):
        launch = plan.launches[0]
        if launch.tile == second.tile(0) and tune_search.key_of(launch) == second.key:
            raise TargetError("the built-in choice fails")
        return 1.0

    found = find([first, second], measure, refused={(first.key, 1): "does not compile"})
    assert found.rejected == {first.key: ["does not compile"], second.key: ["the built-in choice fails"]}
    assert 1 not in found.times[first.key] and second.key not in found.best


def test_the_budget_ends_the_search_after_a_whole_shape(shapes):
    clock = iter(range(100))
    found = find(shapes, lambda plan: 1.0, budget=2, now=lambda: float(next(clock)))
    assert len(found.best) == 2 and found.stopped == "the budget is used up"
    assert found.untried == [shape.key for shape in shapes[2:]]


def test_an_interruption_keeps_complete_shapes(shapes):
    seen = []

    def measure(plan):
        seen.append(plan)
        if len(seen) == len(shapes[0].candidates) + 2:
            raise KeyboardInterrupt
        return 1.0

    found = find(shapes, measure)
    assert list(found.best) == [shapes[0].key] and found.stopped == "interrupted"
    assert found.untried[0] == shapes[1].key and len(found.untried) == len(shapes) - 1


class Spoiling(ReferenceRunner):
    """Changes one value of what launches with two stages write."""

    def bind(self, memory):
        call, launch = super().bind(memory), memory.plan.launches[0]
        role = "out_q" if "out_q" in launch.operands else "out"

        def run():
            call()
            if launch.tile.num_stages == 2 and launch.kernel in tune_search.TUNED:
                view = memory.view(launch.operands[role])
                value = view[(0,) * view.dim()]
                value += 1 if int(value) < 127 else -1

        return run


def test_every_candidate_is_checked_before_it_is_timed(artifact, shapes):
    """Same random data for all candidates of a shape: equal results pass, one changed value does not."""
    some = shapes[:3]
    found = find(some, tune.GpuMeasure(ReferenceRunner(Ticks()), artifact.lowered))
    assert not found.rejected and len(found.best) == len(some)
    assert all(len(found.times[s.key]) == len(s.candidates) for s in some)
    spoiled = find(some, tune.GpuMeasure(Spoiling(Ticks()), artifact.lowered))
    for shape in some:
        two = [i for i in range(len(shape.candidates)) if shape.tile(i).num_stages == 2]
        assert len(spoiled.rejected.get(shape.key, [])) == len(two) and len(two) > 0
        assert all("computes another" in reason for reason in spoiled.rejected[shape.key])
        assert not set(two) & set(spoiled.times[shape.key])


def test_the_built_in_choice_is_checked_against_the_reference(artifact, shapes):
    class Off(ReferenceRunner):
        def bind(self, memory):
            call, launch = super().bind(memory), memory.plan.launches[0]

            def run():
                call()
                for role in ("out", "out_q"):
                    if role in launch.writes:
                        memory.view(launch.operands[role]).add_(3)

            return run

    with pytest.raises(TargetError, match="than the reference kernel"):
        tune.GpuMeasure(Off(Ticks()), artifact.lowered)(shapes[0].candidates[0])


@pytest.fixture
def path(artifact, tmp_path):
    write(artifact, tmp_path / "tiny.qmod")
    return tmp_path / "tiny.qmod"


def test_the_whole_verb_on_reference_kernels(artifact, path, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(device_code, "retarget", lambda *a: written.append(a) or {"output": str(a[1])})
    monkeypatch.setattr(tune, "TARGETS", ("sm_90",))
    options = device_code.DeviceOptions(("sm_90",), (1,))
    result, found = tune.tune(artifact, "sm_90", options, ReferenceRunner(Ticks()), None, Silent())
    assert set(result["tiles"]) == set(found.best) and "reported only" in result["fp16_note"]
    table = tmp_path / "tiles.json"
    result = tune.finish(result, found, path, tmp_path / "out.qmod", table, options, Silent())
    assert tiles.parse_table(json.loads(table.read_text())) == dict(written[0][2].tiles["sm_90"])
    assert written[0][:2] == (path, tmp_path / "out.qmod") and not result["interrupted"]
    bench_tables.print_tune(result)
    assert "out.qmod" in capsys.readouterr().out


def test_an_interrupted_run_writes_the_table_only(path, tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(device_code, "retarget", lambda *a: pytest.fail("wrote a file"))
    found = tune_search.Found(stopped="interrupted")
    result = tune.to_table("sm_90", shapes, found)
    options = device_code.DeviceOptions(("sm_90",))
    for table in (None, tmp_path / "part.json"):
        assert tune.finish(dict(result), found, path, path, table, options, Silent())["interrupted"]
    assert json.loads((tmp_path / "part.json").read_text())["tiles"] == {}


def test_faster_in_fp16_counts_the_quantizer(artifact, shapes):
    plan = make_plan(artifact.lowered, Target("", 2))
    found = find(shapes, lambda p: 10.0)

    class Clock(Ticks):
        def measure(self, call, first, count):
            return 12.0

    rows = fp16_times.faster([plan], shapes, found, lambda p: 3.0, ReferenceRunner(Clock()), Silent())
    assert 0 < len(rows) < len(shapes)  # 12 against 10 + 3 where a quantizer runs before, against 10 elsewhere
    assert all(row["quantizer_us"] == 3 and row["integer_us"] == 13 and row["fp16_us"] == 12 for row in rows)


def test_library_calls_compute_the_same_shape(artifact):
    for launch in make_plan(artifact.lowered, Target("", 2)).launches:
        if launch.kernel in tune_search.TUNED:
            v = kernel(launch.kernel).values(launch)
            outputs = v["O"] * (2 if v["GLU"] else 1)
            result = fp16_times.library_call(launch, 2, torch.device("cpu"))()
            expected = (
                (v["rows"], outputs) if "rows" in v else (v["pixels"] // (v["OH"] * v["OW"]), outputs, v["OH"], v["OW"])
            )
            assert tuple(result.shape) == expected and result.dtype == torch.float16


def test_options_keep_what_the_file_holds(artifact):
    assert tune.options_for(artifact, "sm_90", None).batches == device_code.DEFAULT_BATCHES
    assert tune.options_for(artifact, "sm_90", (2, 5)).targets == ("sm_90",)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence(path):
    run_ = CliRunner().invoke(cli.main, ["tune", str(path)])
    assert run_.exit_code == 8 and run_.stderr.startswith("error: tune measures kernels on a GPU")


def test_one_kernel_that_does_not_compile_costs_no_other_its_place(shapes, monkeypatch):
    plans = [shape.candidates[0] for shape in shapes[:4]]

    def compile_plans(wanted, jobs=None, progress=None):
        if plans[2] in wanted:
            raise TargetError("too much shared memory")
        return {str(plans.index(plan)): None for plan in wanted}

    monkeypatch.setattr(single_launch.aot, "compile_plans", compile_plans)
    runner = single_launch.GpuRunner(torch.device("cpu"))
    assert runner.prepare(plans) == {2: "too much shared memory"} and set(runner._cubins) == {"0", "1", "3"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tuned_on_a_gpu_then_measured(path, tmp_path, labelled_source):
    """The verbs for real: every candidate right, a file with the tiles found, a bench of that file with everything on."""
    output, table = tmp_path / "tuned.qmod", tmp_path / "tiles.json"
    result = tune.run(path, output, (1, 3), None, table)
    assert result["tiles"] and not result["rejected"] and not result["untried"]
    loaded = read(output)
    arch = result["arch"]
    for launch in loaded.device.plans[arch, 3].launches:
        if launch.kernel in tune_search.TUNED:
            assert launch.tile == tiles.parse_table(result)[tune_search.key_of(launch)]
    options = bench.Options((1, 2, 7), 3, True, ("eager fp16", "channels_last fp16"))
    measured = bench.measure(output, loaded, labelled_source, options, machine.pick_device("cuda"))
    for group in measured["batches"]:
        assert all("microseconds" in row and row["peak_bytes"] > 0 for row in group["rows"]), group
    assert measured["batches"][1]["plan"] == "no plan for 2: the plan for 3, filled up"
    assert all("failed" not in row for row in measured["kernels"]["plans"]["1"])


def test_candidates_are_compiled_without_a_gpu(small_files, monkeypatch, tmp_path):
    for name, count in (("CANDIDATES", 2), ("DEEP", 0), ("DEEPER", 0)):
        monkeypatch.setattr(tune_search, name, count)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["tune", str(small_files["chain"]), "--prepare", "sm_80", "--batch", "2"]
    done = CliRunner().invoke(cli.main, [*command, "--json", "-q"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["cache"] == str(default_cache()) and not found["refused"] and 2 in found["batches"]
    targets = [Target("sm_80", batch, torch.float16) for batch in found["batches"]]
    plans = [plan for s in shapes_of(read(small_files["chain"]).lowered, targets) for plan in s.candidates]
    keys = {key for plan in plans for key in aot.plan_keys(plan)}
    assert (found["candidates"], found["kernels"]) == (len(plans), len(keys)) and len(keys) > len(plans) / 4
    assert all(Cache(default_cache()).get(key) is not None for key in keys)
    told = CliRunner().invoke(cli.main, command)
    assert f"{len(keys)} kernels for {len(plans)} candidates" in told.output
