"""The bench verb on the CPU, with an invented clock and invented contenders."""

import json
import math
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from edadm_compile import cli
from edadm_compile.driver import bench, bench_inputs, ceilings, contenders, kernel_times, machine
from edadm_compile.driver.single_launch import ReferenceRunner, operations, traffic
from edadm_compile.errors import ContractError, InputError, TargetError
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from edadm_compile.passes.base import Silent
from edadm_compile.report import bench_tables
from edadm_compile.runtime.artifact import write


class Ticks:
    """A clock that says 1000, 1001, 1002, ... microseconds."""

    def __init__(self):
        self.value = 999.0

    def measure(self, call, first, count):
        for number in range(first, first + count):
            call(number)
        self.value += 1
        return self.value


@pytest.fixture
def path(artifact, tmp_path):
    write(artifact, tmp_path / "tiny.qmod")
    return tmp_path / "tiny.qmod"


OPTIONS = bench.Options((1, 3), repeats=3)


def measure(path, artifact, source, options=OPTIONS):
    return bench.measure(path, artifact, source, options, machine.Cpu(clock=Ticks()))


def test_cpu_engines_and_baselines(path, artifact, labelled_source, capsys):
    result = measure(path, artifact, labelled_source)
    assert [group["batch"] for group in result["batches"]] == [1, 3]
    assert "no GPU kernel was measured" in result["note"]
    for group in result["batches"]:
        ours, reference, *others = group["rows"]
        assert reference["contender"] == "reference" and reference["sqnr_to_reference_db"] is None  # equal
        assert ours["contender"] == "onnxruntime" and ours["sqnr_to_reference_db"] > 5
        assert [row["contender"] for row in others] == ["eager fp32", "channels_last fp32"]
        assert ours["ratio"] == {"median": 1, "p10": 1, "p90": 1, "rounds": 3}
        for row in group["rows"]:
            assert 1000 <= row["microseconds"]["median"] < 1100 and row["first_call_seconds"] > 0
            assert row["images_per_second"] == pytest.approx(group["batch"] / row["microseconds"]["median"] * 1e6)
        assert others[0]["sqnr_to_float_db"] is None or others[0]["sqnr_to_float_db"] > 100
        assert abs(others[0]["sqnr_to_reference_db"] - reference["sqnr_to_float_db"]) < 5
    json.dumps(result, allow_nan=False)
    bench_tables.print_bench(result)
    assert "channels_last fp32" in capsys.readouterr().out
    parameters = labelled_source.parameters()
    assert result["batches"][0]["rows"][2]["weight_bytes"] == 4 * parameters


class Fake(contenders.Contender):
    """A contender whose inputs stay on the host, whatever the device is called."""

    def place(self, inputs, device):
        return list(inputs)


def ours(artifact, change, name="cuda"):
    engine = artifact.lowered
    return Fake(name, "", lambda: lambda *inputs: change(engine(*inputs)), 10, ours=True)


@pytest.mark.parametrize("row", [0, 4])
def test_a_wrong_image_anywhere_in_the_batch_stops_everything(path, artifact, monkeypatch, row):
    def spoil(value):
        value = value.clone()
        value[row] += value.std()
        return value

    monkeypatch.setattr(bench, "our_contenders", lambda *_: [ours(artifact, spoil)])
    with pytest.raises(ContractError, match=r"no times: the cuda engine computes something else .* at batch 5"):
        measure(path, artifact, None, bench.Options((5,), 2))


def test_rounding_noise_below_that_of_quantization_is_accepted(path, artifact, monkeypatch, labelled_source):
    def noisy(value):
        generator = torch.Generator().manual_seed(0)
        return value + 0.02 * value.std() * torch.randn(value.shape, generator=generator)

    monkeypatch.setattr(bench, "our_contenders", lambda *_: [ours(artifact, noisy)])
    row = measure(path, artifact, None, bench.Options((2,), 2))["batches"][0]["rows"][0]
    assert 30 < row["sqnr_to_reference_db"] < 38


def test_losing_more_than_the_reference_engine_is_refused():
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(2, 100, generator=generator)
    noise = torch.randn(2, 100, generator=generator)
    reference = original + 0.01 * noise
    truth = bench_inputs.Truth([], reference, original, bench_inputs.sqnr(original, reference))
    assert truth.floor == bench_inputs.ENOUGH_DB
    for factor, right in ((0.012, False), (0.0101, True)):
        found = bench_inputs.compare(original + factor * noise, truth)
        if right:
            bench_inputs.check("cuda", 2, found, truth)
        else:
            with pytest.raises(ContractError, match="more is lost than rounding explains"):
                bench_inputs.check("cuda", 2, found, truth)
    broken = bench_inputs.compare(torch.full((2, 100), math.nan), truth)
    assert broken.reference == -math.inf
    assert bench_inputs.compare(reference[:, :50], replace(truth, original=None)).reference == -math.inf


@pytest.mark.parametrize(("noise", "floor"), [(None, 10), (50.0, 20), (12.0, 8), (2.0, 3)])
def test_the_floor_follows_the_noise_of_the_file(noise, floor):
    assert bench_inputs.Truth([], torch.zeros(1), None, noise).floor == floor


class Watched(machine.Cpu):
    """A device that pretends: each call peaks at 100 bytes and keeps 10."""

    kind = "cuda"

    def __init__(self):
        super().__init__("cuda", Ticks())

    def watched(self, function):
        return function(), 100, 10


def test_memory_of_a_contender_adds_up_and_failures_cost_only_themselves(path, artifact, monkeypatch, labelled_source):
    def explode():
        raise RuntimeError("no such kernel\nsecond line")

    others = [
        Fake("broken", "", explode, 1),
        Fake("overflows", "", lambda: lambda *i: torch.full(tuple(i[0].shape), math.inf), 1),
        Fake("fine", "", lambda: labelled_source.denoiser(), 1),
    ]
    monkeypatch.setattr(bench, "our_contenders", lambda *_: [ours(artifact, lambda value: value)])
    monkeypatch.setattr(bench, "baseline_contenders", lambda *_: others)
    monkeypatch.setattr(bench, "describe_machine", lambda device: {})
    result = bench.measure(path, artifact, labelled_source, OPTIONS, Watched())
    rows = [{row["contender"]: row for row in group["rows"]} for group in result["batches"]]
    assert [r["cuda"]["peak_bytes"] for r in rows] == [100, 110]
    assert [r["cuda"]["first_call_is"] for r in rows] == ["load to first output", "first at this batch"]
    for r in rows:
        assert r["broken"]["failed"] == "RuntimeError: no such kernel" and "microseconds" not in r["broken"]
        assert r["overflows"]["failed"] == "its prediction is not finite"
        assert r["fine"]["microseconds"]["rounds"] == 3
    assert result["note"] == ""


def test_inputs_rotate_as_in_a_sampler(artifact):
    drawn = bench_inputs.draw(artifact.lowered, 3, 4, seed=5)
    steps = bench_inputs.timesteps(artifact.lowered).tolist()
    assert len(drawn) == 4 and all(value[2] is drawn[0][2] for value in drawn)
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert [float(value[1][0]) for value in drawn][:: len(drawn) - 1] == [steps[0], steps[-1]]
    assert all(bool((value[1] == value[1][0]).all()) and float(value[1][0]) in steps for value in drawn)
    pool = {artifact.lowered.signature.inputs[2].name: torch.tensor([4, 2])}
    assert bench_inputs.draw(artifact.lowered, 3, 1, 0, pool)[0][2].tolist() == [4, 2, 4]


def test_how_a_batch_runs():
    assert bench_inputs.plan_note(8, (1, 8)) == "plan for 8"
    assert bench_inputs.plan_note(3, (1, 8)) == "no plan for 3: the plan for 8, filled up"
    assert bench_inputs.plan_note(64, (1, 8)) == "no plan for 64: 8 times the plan for 8"
    assert bench_inputs.plan_note(19, (1, 8)).endswith(
        "2 times the plan for 8 and no plan for 3: the plan for 8, filled up"
    )


@pytest.mark.parametrize("text", ["", "0", "1,x", "-3", "1.5"])
def test_bad_batches(text):
    with pytest.raises(InputError, match="positive integers"):
        bench.parse_batches(text)
    assert bench.parse_batches("8,1,8") == (1, 8) and bench.parse_batches(None) is None


def test_devices():
    assert machine.pick_device("cpu").kind == "cpu"
    with pytest.raises(InputError, match="allowed cpu, cuda"):
        machine.pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(TargetError, match="no CUDA GPU"):
            machine.pick_device("cuda")
        assert machine.pick_device(None).kind == "cpu"


def test_command_line(path):
    run = CliRunner().invoke(
        cli.main, ["bench", str(path), "--json", "--batch", "2", "--repeats", "2", "--device", "cpu"]
    )
    assert run.exit_code == 0, run.output
    (group,) = json.loads(run.stdout)["batches"]
    assert group["batch"] == 2
    assert [row["contender"] for row in group["rows"]] == ["onnxruntime", "reference"]
    bad = CliRunner().invoke(cli.main, ["bench", str(path), "--batch", "none"])
    assert bad.exit_code == 2 and "error: --batch" in bad.stderr


def test_another_model_as_baseline_is_refused(path, tmp_path):
    run = CliRunner().invoke(
        cli.main, ["bench", str(path), "--baseline", "examples/digits/model.pt", "--device", "cpu"]
    )
    assert run.exit_code == 2 and "--baseline takes inputs" in run.stderr


def test_every_launch_alone(artifact, capsys):
    plan = make_plan(artifact.lowered, Target("", 2))
    runner = ReferenceRunner(Ticks())
    found = ceilings.measure(runner, "", side=64, copy=1024)
    rows = kernel_times.shares(kernel_times.launch_times(plan, artifact.lowered, runner, Silent()), found)
    assert len(rows) == len(plan.launches) and {row["index"] for row in rows} == set(range(len(rows)))
    times = [row["microseconds"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert sum(row["share_of_step"] or 0 for row in rows) == pytest.approx(1)
    for row in rows:
        matrix = row["kernel"] in ("qconv2d", "qlinear")
        peak = found["int8_operations_per_second"] if matrix else found["copy_bytes_per_second"]
        amount = row["operations"] if matrix else row["bytes"]
        assert row["share_of_peak"] == pytest.approx(amount / row["microseconds"] * 1e6 / peak)
    result = {
        "artifact": "x",
        "file_bytes": 1,
        "note": "",
        "batches": [],
        "machine": machine.describe_machine(machine.Cpu()),
    }
    bench_tables.print_bench({**result, "kernels": {"ceilings": found, "plans": {"2": rows}}})
    assert "ceilings measured here" in capsys.readouterr().out


def test_operations_and_bytes_of_a_convolution(artifact):
    plan = make_plan(artifact.lowered, Target("", 2))
    launch = next(x for x in plan.launches if x.kernel == "qconv2d" and x.constants.get("SEGMENTS", 1) == 1)
    c = launch.constants
    assert operations(launch) == 2 * c["O"] * c["C"] * c["KH"] * c["KW"] * 2 * c["OH"] * c["OW"]
    doubled = replace(launch, constants={**c, "SEGMENTS": 2, "C2": c["C"]})
    assert operations(doubled) == 2 * operations(launch)
    assert traffic(launch) >= 2 * c["C"] * c["H"] * c["W"]
