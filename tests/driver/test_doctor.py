import json
import re
import tomllib
from pathlib import Path

import pytest

from edadm_compile.driver import doctor
from edadm_compile.errors import TargetError
from edadm_compile.export.trial import ANSWER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the compiler, which takes seconds."""
    monkeypatch.setattr(doctor, "_triton", lambda: ("not tried", ""))


def by_name(result):
    return {row["name"]: row for row in result["checks"]}


def test_versions_are_those_of_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["onnx"],
        *project["optional-dependencies"]["cuda"],
    ]
    known = doctor.BASICS | {name: least for name, (least, _) in doctor.EXTRAS.items()}
    assert known == dict(re.match(r"([\w-]+)>=([\d.]+)", text).groups() for text in wanted)


def test_it_tries_and_the_machine_of_the_tests_works(quick):
    result = doctor.run()
    rows = by_name(result)
    assert result["works"] and rows["reference engine"]["state"] == "works" and rows["torch computes"]["basic"]
    assert rows["ONNX Runtime engine"]["state"] == "works"
    doctor.check(result)


def test_the_compiler_is_really_run():
    found, _ = doctor._triton()
    assert re.fullmatch(r"a kernel for sm_80: \d{3,} bytes of machine code, \d+ registers", found)


def test_products_that_saturate_are_told(quick, monkeypatch):
    monkeypatch.setattr("edadm_compile.runtime.engines.trial.largest_products", lambda model, channels: 1_000_000)
    row = by_name(doctor.run())["ONNX Runtime engine"]
    assert f"a sum of {ANSWER} comes out as 1000000" in row["found"] and "--engine reference" in row["remedy"]


@pytest.mark.parametrize(
    ("version", "state", "found"),
    [(None, "missing", "not installed, needed is 2.11 or newer"), ("2.9.1+cpu", "fails", "2.9.1+cpu is too old"), ("2.11rc1", "works", "2.11rc1")],
)  # fmt: skip
def test_a_basic_package_that_is_missing_or_old(quick, monkeypatch, version, state, found):
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: version if name == "torch" else real(name))
    result = doctor.run()
    row = by_name(result)["torch"]
    assert (
        row["state"] == state
        and row["found"].startswith(found)
        and row["remedy"].startswith("pip install 'torch>=2.11'") is (state != "works")
    )
    assert result["works"] is (state == "works")
    if state != "works":
        with pytest.raises(TargetError, match=r"doctor: torch missing or broken; run: pip install 'torch>=2\.11'"):
            doctor.check(result)


def test_whatever_an_attempt_raises_is_a_finding():
    def fail():
        raise ImportError("libsomething.so: cannot open\nshared object")

    row = doctor._attempt("engine", fail)
    assert (row.state, row.found) == ("fails", "ImportError: libsomething.so: cannot open shared object")


def test_the_verb(quick, monkeypatch):
    from click.testing import CliRunner

    from edadm_compile.cli import main

    run = CliRunner().invoke(main, ["doctor", "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["works"] and run.stderr == ""
    run = CliRunner().invoke(main, ["doctor"])
    assert run.exit_code == 0 and re.search(r"^works +torch +2\.", run.stdout, re.M)
    monkeypatch.setattr(doctor, "version_of", lambda name: None)
    run = CliRunner().invoke(main, ["doctor", "--quiet"])
    assert run.exit_code == 8 and "→ pip install 'torch>=2.11'" in run.stdout and "processor" not in run.stdout
    assert run.stderr.startswith("error: doctor: torch, numpy")
