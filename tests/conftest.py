import pytest

from edadm_compile.driver.compile import to_artifact
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import to_bytes
from tests.graphs import TinyUNet, small_config, source_of


@pytest.fixture(scope="session")
def compiled():
    """A tiny labelled UNet, compiled with everything on."""
    source = source_of(TinyUNet(classes=5), num_classes={"label": 5})
    return compile_source(source, small_config(attention="int8"))


@pytest.fixture(scope="session")
def artifact(compiled):
    return to_artifact(compiled)


@pytest.fixture(scope="session")
def data(artifact):
    """The bytes of the file."""
    return to_bytes(artifact)
