import os

import torch

if not torch.cuda.is_available():  # must be decided before anything imports Triton: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import pytest

from edadm_compile.driver.compile import to_artifact
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import to_bytes, write
from tests.graphs import TinyUNet, float_program, small_config, source_of


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Compiled kernels of the tests do not go into the user's cache; EDADM_TEST_CACHE names one that is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", os.environ.get("EDADM_TEST_CACHE") or str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def labelled_source():
    """A tiny UNet with five class labels."""
    return source_of(TinyUNet(classes=5), num_classes={"label": 5})


@pytest.fixture(scope="session")
def labelled_program(labelled_source):
    """The same after all float passes."""
    return float_program(labelled_source)


@pytest.fixture(scope="session")
def compiled(labelled_source):
    """The same, compiled with everything on."""
    return compile_source(labelled_source, small_config(attention="int8"))


@pytest.fixture(scope="session")
def artifact(compiled):
    return to_artifact(compiled)


@pytest.fixture(scope="session")
def data(artifact):
    """The bytes of the file."""
    return to_bytes(artifact)


@pytest.fixture
def path(artifact, tmp_path):
    """The same as a file."""
    write(artifact, tmp_path / "tiny.qmod")
    return tmp_path / "tiny.qmod"


@pytest.fixture
def old(tmp_path):
    """An older file where the new one is to go."""
    (tmp_path / "out.onnx").write_bytes(b"older")
    return tmp_path / "out.onnx"


@pytest.fixture(scope="session")
def small_files(tmp_path_factory, _own_cache):
    """Two artifacts of a few layers with GPU code, by name: for tests that change files."""
    from benchmarks.robustness import seeds

    return seeds.make(tmp_path_factory.mktemp("small"))
