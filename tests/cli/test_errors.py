"""Every error a user can cause from the command line, as (command, exit code, sentence).

In commands and sentences stand: {makers} for the module of factories, {ddim} for a scheduler, {two} for it with two
steps and no GPU code, {ref} for the float model of tiny.qmod. "…" in a sentence is text of other libraries, a figure
that may differ between machines, or a name that torch draws.
"""

import re
from pathlib import Path

import pytest
import torch

from edadm_compile.cli import main
from edadm_compile.errors import EdadmError, InputError
from tests.cli import cases_artifacts, cases_models, cases_sampling, cases_settings, cases_usage, cases_work

SHORT = {
    "{makers}": "tests.cli.makers",
    "{ddim}": "--scheduler scheduler.json",
    "{two}": "--scheduler scheduler.json --steps 2 --targets none",
    "{ref}": "--reference tiny.pt --factory tests.cli.makers:tiny --shape 3,8,8 --cond good_labels.cond",
}
MODULES = (cases_usage, cases_settings, cases_models, cases_sampling, cases_artifacts, cases_work)
CASES = [case for module in MODULES for case in module.CASES]


def written_out(text):
    for short, long in SHORT.items():
        text = text.replace(short, long)
    return text


@pytest.mark.parametrize(("command", "code", "sentence"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_an_error_is_one_sentence(command, code, sentence, folder, invoke, monkeypatch):
    if (
        "no CUDA GPU here" in sentence.replace("finds no CUDA GPU here", "no CUDA GPU here")
        and torch.cuda.is_available()
    ):
        pytest.skip("there is a GPU")
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in folder.iterdir())
    result = invoke(written_out(command).split())
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(("error:", "internal error:"))]
    assert line == result.stderr.splitlines()[-1]
    expected = ".*".join(re.escape(part) for part in f"error: {written_out(sentence)}".split("…"))
    assert re.fullmatch(expected, line), line
    assert result.exit_code == code
    assert sorted(path.name for path in folder.iterdir()) == before  # and nothing is written


def test_no_command_stands_twice():
    assert len({case[0] for case in CASES}) == len(CASES)


# what nobody planned for


@pytest.fixture
def broken(monkeypatch):
    """Makes `inspect` raise something."""

    def fail(error):
        def read(path):
            raise error

        monkeypatch.setattr("edadm_compile.runtime.artifact.read", read)

    return fail


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RuntimeError("a\nb"), 70, "internal error: RuntimeError: a b; this is a bug: run again with --debug and please report what it prints"),
        (KeyError(), 70, "internal error: KeyError; this is a bug: run again with --debug and please report what it prints"),
        (MemoryError(), 1, "error: out of memory; give the machine more, or ask for less: smaller --batch or --calib-samples"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "error: out of memory; give the machine more, or ask for less: smaller --batch or --calib-samples"),
        (OSError(28, "No space left on device", "x.qmod"), 2, "error: cannot use x.qmod: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted: nothing was written"),
    ],
    ids=["bug", "silent bug", "memory", "torch memory", "disk", "ctrl-c"],
)  # fmt: skip
def test_unplanned_exceptions(broken, invoke, error, code, sentence):
    broken(error)
    result = invoke(["inspect", "x.qmod"])
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"{sentence}\n", "")


def test_debug_shows_the_traceback_and_keeps_the_exit_code(broken, invoke):
    broken(InputError("no good"))
    result = invoke(["inspect", "x.qmod", "--debug"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback") and result.stderr.endswith("error: no good\n")


def test_a_closed_pipe_is_no_bug(broken, invoke):
    broken(BrokenPipeError(32, "Broken pipe"))
    result = invoke(["inspect", "x.qmod"])
    assert result.exit_code == 1 and "error" not in result.stderr


def _codes(error=EdadmError):
    return {error.exit_code}.union(*(_codes(below) for below in error.__subclasses__()))


def test_every_exit_code_is_in_the_help_and_in_the_documentation(invoke):
    told = " ".join(invoke(["--help"]).stdout.split()).partition("Exit codes:")[2]
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8").partition("## Exit codes")[2]
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    codes = {case[1] for case in CASES} | _codes() | {0, 70, 130, 143}
    assert table == codes
    assert all(re.search(rf"\b{code} ", told) for code in codes - {1})  # 1 is what click and Python give


def test_the_program_has_one_name():
    assert main.name == "edadm-compile"
