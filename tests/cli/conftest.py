import pytest
from click.testing import CliRunner

from edadm_compile.cli import main
from tests.cli import files


@pytest.fixture(scope="session")
def folder(tmp_path_factory, artifact):
    """The files of `files.make`."""
    made = tmp_path_factory.mktemp("files")
    files.make(made, artifact)
    return made


@pytest.fixture
def invoke(monkeypatch):
    """Runs a command line in this process; the import path is restored afterwards."""
    monkeypatch.setattr("sys.path", list(__import__("sys").path))

    def run(arguments, **options):
        return CliRunner().invoke(main, arguments, **options)

    return run
