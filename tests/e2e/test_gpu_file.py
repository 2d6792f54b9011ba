"""A UNet to a file with GPU code and back, and the CUDA engine on it; the driver's kernels are the references."""

import json

import pytest
import torch
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.config import QuantConfig
from edadm_compile.driver.compile import to_artifact
from edadm_compile.errors import TargetError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.kernels import plan_json
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, write
from edadm_compile.runtime.engines.cuda import CudaEngine
from edadm_compile.runtime.session import load
from tests.graphs import TinyUNet, source_of
from tests.lowering.plans import QUICK, inputs_of
from tests.runtime.test_cuda_engine import FakeDriver, make_bundle


@pytest.fixture(scope="module")
def result():
    source = source_of(TinyUNet(classes=5), (3, 8, 8), 2, num_classes={"label": 5})
    return compile_source(source, QuantConfig(**QUICK), quality=False)


def engine_for(program, batches, **target):
    bundle = make_bundle(*(make_plan(program, Target("sm_90", b, **target)) for b in batches))
    return CudaEngine(program, bundle, "cpu", arch="sm_90", driver=FakeDriver(bundle), graphs=False)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_the_engine_equals_the_reference_engine(result, batch):
    """Batches that have a plan, that are filled up and that are cut; float32 between kernels: bit for bit."""
    program = result.lowered
    engine = engine_for(program, (1, 4), store=torch.float32, exact=True)
    for seed in range(2):
        values = inputs_of(program, batch, seed)
        with torch.no_grad():
            assert torch.equal(engine(*values), program(*values))


@pytest.mark.parametrize("store", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_between_kernels_costs_little(result, store):
    """8-bit codes are the coarser rounding: half a per cent of them change, none by much."""
    program = result.lowered
    values = inputs_of(program, 4)
    with torch.no_grad():
        expected = program(*values)
    least = {torch.float16: 35.0, torch.bfloat16: 22.0}[store]
    assert sqnr(expected, engine_for(program, (4,), store=store)(*values)) > least


@pytest.fixture(scope="module")
def file(result, tmp_path_factory):
    """The same, compiled for two architectures by the command line."""
    path = tmp_path_factory.mktemp("gpu") / "tiny.qmod"
    write(to_artifact(result), path)
    arguments = ["target", str(path), "--targets", "sm_80,sm_90", "--batch", "2", "--json"]
    outcome = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return path, json.loads(outcome.stdout)


def test_plans_and_kernels_come_back(file):
    path, summary = file
    artifact = read(path)
    bundle = artifact.device
    assert bundle.archs == ("sm_80", "sm_90") and bundle.batches("sm_90") == (2,)
    assert summary["device"]["kernels"] == len(bundle.cubins)
    for (arch, batch), plan in bundle.plans.items():
        assert plan_json.to_json(plan) == plan_json.to_json(make_plan(artifact.lowered, Target(arch, batch)))
    for cubin in bundle.cubins.values():
        assert cubin.data.startswith(b"\x7fELF") and cubin.spills == 0


def test_inspect_shows_every_launch(file):
    outcome = CliRunner().invoke(main, ["inspect", str(file[0]), "--launches", "sm_90:2", "--json"])
    rows = json.loads(outcome.stdout)
    plan = read(file[0]).device.plans["sm_90", 2]
    assert len(rows) == len(plan.launches)
    for row, launch in zip(rows, plan.launches, strict=True):
        assert bool(row["why_float"]) == (launch.kernel == "torch") and (row["registers"] or launch.kernel == "torch")
    human = CliRunner().invoke(main, ["inspect", str(file[0])])
    assert "sm_90" in human.stdout and "GPU code" in human.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{file}", "--launches", "sm_89:2"], "the file has sm_80:2, sm_90:2"),
        (["inspect", "{file}", "--launches", "sm_90"], "such as sm_90:8"),
        (["target", "{file}", "--targets", "sm_70"], "allowed sm_80"),
        (["target", "{file}", "--batch", "1,x"], "positive integers"),
        (["target", "{file}", "--batch", "100000"], "accepts up to"),
    ],
)
def test_bad_requests_say_what_is_allowed_and_leave_the_file_alone(file, arguments, message):
    before = file[0].read_bytes()
    outcome = CliRunner().invoke(main, [a.format(file=file[0]) for a in arguments])
    assert outcome.exit_code == 2 and message in outcome.output and "Traceback" not in outcome.output
    assert file[0].read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_machine_without_a_gpu_says_so(file):
    with pytest.raises(TargetError, match="no CUDA GPU"):
        load(file[0], device="cuda")
