"""Files for ONNX Runtime and GPU code exclude each other: refused before any work, and nothing is touched."""

import pytest
from click.testing import CliRunner
from torch import nn

from edadm_compile import cli
from edadm_compile.config import QuantConfig
from edadm_compile.driver import compile as compile_driver
from edadm_compile.driver import device_code, tune
from edadm_compile.driver.compile import Request, compile_model, to_artifact
from edadm_compile.driver.device_code import DeviceOptions, retarget
from edadm_compile.errors import ConfigError, InputError
from edadm_compile.kernels.targets import DEFAULT_TARGETS
from edadm_compile.passes.base import Silent
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read, to_bytes, write
from tests.graphs import source_of
from tests.lowering.plans import QUICK


class Small(nn.Module):
    """Two convolutions, the first of which writes codes."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x, t):
        return self.head(self.stem(x).relu())


def config(deploy="onnxruntime"):
    return QuantConfig(**{**QUICK, "deploy": deploy})


@pytest.fixture(scope="module")
def source():
    return source_of(Small(), steps=2)


@pytest.fixture(scope="module")
def result(source):
    return compile_source(source, config(), quality=False)


@pytest.fixture
def path(result, tmp_path):
    write(to_artifact(result), tmp_path / "unet.qmod")
    return tmp_path / "unet.qmod"


@pytest.fixture
def no_work(monkeypatch):
    """Fails where anything is loaded, compiled or built."""
    for module, name in (
        (compile_driver, "compile_source"), (compile_driver, "load_source"), (compile_driver, "build"),
        (device_code, "build"), (device_code, "make_plans"), (tune, "tune"), (tune, "GpuRunner"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: pytest.fail(f"called {name}"))


@pytest.fixture(params=["absent", "present"])
def output(request, tmp_path):
    """A path to write to, and a check that nothing was written."""
    target = tmp_path / "out.qmod"
    if request.param == "present":
        target.write_bytes(b"something older")
    before = sorted(tmp_path.iterdir())

    def untouched(*besides):
        assert sorted(tmp_path.iterdir()) == sorted({*before, *besides})
        return not target.exists() or target.read_bytes() == b"something older"

    return target, untouched


# compile


@pytest.mark.parametrize("targets", ["sm_80", "sm_80,sm_90", "all", None])
def test_compiling_with_gpu_code_is_refused_before_any_work(source, output, no_work, targets, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    target, untouched = output
    with pytest.raises(ConfigError, match=r"deploy = 'onnxruntime' and targets sm_80.* exclude each other"):
        compile_model(source, config(), output=target, targets=targets)
    assert untouched()


def test_without_an_output_no_gpu_code_is_asked_for(source, result, monkeypatch):
    monkeypatch.setattr(compile_driver, "compile_source", lambda *a, **k: result)
    assert compile_model(source, config(), targets="sm_80") is result


def test_other_programs_are_compiled_with_gpu_code(source, result, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(compile_driver, "compile_source", lambda *a, **k: result)
    monkeypatch.setattr(compile_driver, "build", lambda program, options, progress: built.append(options.targets))
    compile_model(source, config(deploy=None), output=tmp_path / "a.qmod", targets="sm_80")
    compile_model(source, config(), output=tmp_path / "a.qmod")
    assert built == [("sm_80",), ()]


def request(output, deploy, targets, tmp_path):
    return Request(tmp_path / "model.pt", output, "cpu", None, None, {"deploy": deploy}, targets)


def test_the_verb_makes_no_gpu_code_by_default(source, result, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(compile_driver, "load_source", lambda *a: source)
    monkeypatch.setattr(compile_driver, "compile_source", lambda *a, **k: result)
    monkeypatch.setattr(compile_driver, "build", lambda program, options, progress: built.append(options.targets))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for deploy in ("onnxruntime", None):
        summary = compile_driver.run(request(tmp_path / "a.qmod", deploy, None, tmp_path), Silent())
        assert summary["output"] == str(tmp_path / "a.qmod")
    assert built == [(), DEFAULT_TARGETS]


def test_the_verb_refuses_gpu_code_before_it_reads_the_model(output, no_work, tmp_path):
    target, untouched = output
    with pytest.raises(ConfigError, match=r"targets sm_90 exclude each other.*compile twice"):
        compile_driver.run(request(target, "onnxruntime", "sm_90", tmp_path), Silent())
    assert untouched()


# files


def test_gpu_code_is_not_added_to_such_a_file(path, output, no_work):
    target, untouched = output
    before = path.read_bytes()
    for destination in (target, path):
        with pytest.raises(InputError, match="compiled with --deploy onnxruntime, which has no GPU form"):
            retarget(path, destination, DeviceOptions(("sm_80",)))
    assert untouched(path) and path.read_bytes() == before


def test_a_file_without_gpu_code_can_be_written_again(path, result, tmp_path):
    summary = retarget(path, tmp_path / "out.qmod", DeviceOptions(()))
    assert summary["bytes"] == (tmp_path / "out.qmod").stat().st_size
    assert read(tmp_path / "out.qmod").device is None
    assert (tmp_path / "out.qmod").read_bytes() == to_bytes(to_artifact(result)) == path.read_bytes()


@pytest.mark.parametrize("gpu", [False, True], ids=["no gpu", "gpu"])
def test_such_a_file_is_not_tuned(path, output, no_work, monkeypatch, tmp_path, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    target, untouched = output
    with pytest.raises(InputError, match="GPU code: the file was compiled with --deploy onnxruntime"):
        tune.run(path, target, (1,), None, tmp_path / "tiles.json")
    assert untouched(path)


def test_files_of_earlier_versions_have_a_gpu_form(path):
    artifact = read(path)
    for values in ({}, {"config": {}}, {"config": {"deploy": None}}):
        device_code.check_has_form(type(artifact)(artifact.qdq, artifact.lowered, values))


@pytest.mark.parametrize(
    "arguments",
    [["target", "FILE", "--targets", "sm_80", "-o", "OUT"], ["tune", "FILE", "-o", "OUT"]],
    ids=["target", "tune"],
)
def test_the_command_line_says_so_in_one_sentence(path, output, no_work, arguments):
    target, untouched = output
    places = {"FILE": str(path), "OUT": str(target)}
    run = CliRunner().invoke(cli.main, [places.get(a, a) for a in arguments])
    assert run.exit_code == 2 and run.stderr.startswith("error: GPU code: the file was compiled with --deploy")
    assert len(run.stderr.strip().splitlines()) == 1 and untouched(path)
