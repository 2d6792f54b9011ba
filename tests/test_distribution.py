"""What a wheel and an sdist hold, and the wheel outside of the source tree. `make dist-check` also compiles with it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import edadm_compile

ROOT = Path(__file__).parents[1]
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
#: Too large for a package.
_ONLY_HERE = "examples/cifar10/"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(wheel, sdist), built from a copy: setuptools writes beside what it packs."""
    source = tmp_path_factory.mktemp("source")
    for name in ("edadm_compile", "examples", "docs", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=_LEFT_OUT)
    (source / "tests").mkdir()
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE", ROOT / "Makefile"]:
        if path.is_file() and path.suffix in ("", ".md", ".toml", ".txt", ".py", ".yml", ".in"):
            shutil.copy(path, source)
    code = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next((source / "dist").glob("*.whl")), next((source / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def built(packed):
    """(wheel's names, sdist's names, metadata)."""
    wheel, sdist = packed
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        described, names = archive.read(metadata).decode(), set(archive.namelist())
    with tarfile.open(sdist) as archive:
        return names, {name.partition("/")[2] for name in archive.getnames()}, described


def _files(folder):
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and path.suffix != ".pyc"
        and not str(path.relative_to(ROOT)).startswith(_ONLY_HERE)
    }


def test_the_wheel_has_every_file_of_the_package_and_the_examples(built):
    wheel, _, _ = built
    expected = _files("edadm_compile") | {f"edadm_compile/{name}" for name in _files("examples")}
    assert expected <= wheel
    others = {name for name in wheel - expected if ".dist-info/" not in name}
    assert not others


def test_the_sdist_can_be_built_from_and_read(built):
    _, sdist, _ = built
    wanted = _files("edadm_compile") | _files("examples") | _files("docs")
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"} <= sdist


def test_metadata(built):
    wheel, _, described = built
    assert re.search(rf"^Version: {re.escape(edadm_compile.__version__)}$", described, re.MULTILINE)
    assert "License-Expression: Apache-2.0" in described
    for extra in ("cuda", "onnx", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in described
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert "edadm_compile/py.typed" in wheel


def test_an_installed_wheel_is_used_outside_of_the_source_tree(packed, tmp_path):
    """Installed without dependencies, which the test's environment lends, as its own program in an empty folder."""
    target, user = tmp_path / "installed", tmp_path / "user"
    user.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, packed[0]], check=True, capture_output=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def run(*arguments):
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=user, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    program = str(target / "bin" / "edadm-compile")
    assert run("-c", "import edadm_compile; print(edadm_compile.__file__)").startswith(str(target))
    assert "Exit codes:" in run(program, "--help")
    run(program, "example", "digits")
    model = (user / "digits" / "model.pt").read_bytes()
    assert model == (ROOT / "examples" / "digits" / "model.pt").read_bytes()
    assert str(target) in run(program, "doctor", "-v")


def test_the_command_line_tells_the_same_version():
    from click.testing import CliRunner

    from edadm_compile.cli import main

    assert edadm_compile.__version__ in CliRunner().invoke(main, ["--version"]).output
