"""`--budget-bits` and `--min-sqnr` on the command line: what is printed, what is in the file, what is refused."""

import io
import json

import pytest
from click.testing import CliRunner
from rich.console import Console

from edadm_compile.cli import main
from edadm_compile.driver import compile as compile_driver
from edadm_compile.report.mixed_tables import print_mixed
from tests.graphs import Planted, source_of

_SETTINGS = "calib_samples = 8\n[tdac]\ntrajectories = 2\n[reconstruction]\niters = 0\n"


@pytest.fixture(scope="module")
def source():
    return source_of(Planted(), steps=3)


@pytest.fixture
def run(source, tmp_path, monkeypatch):
    """Compiles the planted model; (result of the command, output file)."""
    monkeypatch.setattr(compile_driver, "load_source", lambda *a: source)
    settings, output = tmp_path / "a.toml", tmp_path / "a.qmod"
    settings.write_text(_SETTINGS)

    def invoke(*options):
        fixed = ["compile", "model.pt", "--config", settings, "-o", output, "--targets", "none"]
        return CliRunner().invoke(main, [str(a) for a in (*fixed, *options)]), output

    return invoke


def _shown(path, *options):
    return CliRunner().invoke(main, ["inspect", str(path), *options]).stdout


def test_the_choice_is_in_the_summary_and_in_the_file(run):
    result, path = run("--budget-bits", 5.5, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    mixed = summary["mixed_precision"]
    assert mixed["budget_bits"] == 5.5 and mixed["min_sqnr"] is None and mixed["measured"]
    assert (
        mixed["stored_bits"] == pytest.approx(summary["average_weight_bits"], abs=1e-3) and mixed["stored_bits"] <= 5.5
    )
    assert summary["layers"] == {"w4a8": 3, "w8a16": 1, "w8a8": 2} and summary["sqnr_db"]["sqnr"] > 0
    assert json.loads(_shown(path, "--json"))["mixed_precision"] == mixed
    text = " ".join(_shown(path).split())
    assert f"asked for at most 5.5 bits: {mixed['stored_bits']:.3f} stored bits per weight" in text
    assert f"predicted noise SQNR {mixed['predicted_sqnr']:.1f} dB" in text and "best predicted by size" in text


def test_a_wanted_quality_is_printed_with_what_it_takes(run):
    result, _ = run("--min-sqnr", 20)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "asked for at least 20 dB" in text and "layers at 8, chosen by error" in text and "w8a16 fixed" in text


def test_a_measured_quality_below_the_wanted_one_is_said():
    mixed = {
        "budget_bits": None, "min_sqnr": 30.0, "measured": True, "stored_bits": 5.0, "predicted_sqnr": 30.2,
        "layers": [], "curve": [],
    }  # fmt: skip
    for measured, said in ((29.4, True), (30.0, False), (None, False)):
        out = Console(width=400, record=True, file=io.StringIO())
        print_mixed(out, mixed, {"sqnr": measured})
        text = out.export_text()
        assert ("has 29.4 dB, less than the 30 dB asked for" in text and "ask for 30.6 dB" in text) == said


def test_without_either_nothing_is_said(run):
    result, path = run("--json")
    assert json.loads(result.stdout)["mixed_precision"] is None
    assert json.loads(_shown(path, "--json"))["mixed_precision"] is None and "asked for" not in _shown(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget-bits", 5, "--min-sqnr", 30), "budget_bits = 5.0 and min_sqnr = 30.0 exclude each other"),
        (("--budget-bits", 5, "--uniform"), "budget_bits and uniform exclude each other"),
        (("--min-sqnr", 30, "--w8a8"), "weight_bits: got 8 together with min_sqnr"),
        (("--budget-bits", 4.1), "the smallest that this model reaches is 4.632"),
        (("--min-sqnr", 119), "min_sqnr: got 119.0 dB, the highest"),
    ],
    ids=["both", "uniform", "preset", "budget", "quality"],
)
def test_what_cannot_be_is_one_sentence(run, options, message):
    result, path = run(*options, "--quiet")
    assert result.exit_code == 2 and message in result.output and result.output.count("\n") == 1
    assert "Traceback" not in result.output and not path.exists()
