"""What verbs share: how they talk, complete, and start quickly."""

import io
import json
import subprocess
import sys
import time

import click
import pytest
from click.shell_completion import ShellComplete
from rich.console import Console
from rich.progress import Progress

from edadm_compile.cli import NAME, main
from edadm_compile.passes.base import Context
from edadm_compile.report import memory, progress
from tests.graphs import small_config

HEAVY = ("torch", "numpy", "diffusers", "rich", "onnx", "onnxruntime", "scipy", "triton", "safetensors")
VERBS = sorted(main.commands)


@pytest.mark.parametrize(
    "code",
    [
        "import edadm_compile; assert edadm_compile.QuantConfig().name == 'w4a8'",
        "import edadm_compile.cli as c; c.main(['--help'], standalone_mode=False)",
        "import edadm_compile.cli as c; c.main(['--version'], standalone_mode=False)",
        "import edadm_compile.cli as c; c.main(['compile', '--help'], standalone_mode=False)",
        "import edadm_compile.cli as c; c.main(['completion', 'zsh'], standalone_mode=False)",
        "import edadm_compile.cli as c\ntry: c.main(['x', '--targts'], standalone_mode=False)\nexcept Exception: pass",
    ],
    ids=["import", "help", "version", "verb help", "completion", "wrong option"],
)
def test_nothing_heavy_is_loaded(code):
    check = f"{code}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_talks_the_same_way(verb):
    options = {name for p in main.commands[verb].params for name in p.opts}
    assert {"--json", "--quiet", "-q", "--verbose", "-v", "--debug"} <= options


def test_json_is_alone_on_standard_output(folder, invoke, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["sample", "tiny.qmod", "-n", "1", "--engine", "reference", "--steps", "2", "-o", "grid.png"]
    loud, quiet = invoke([*arguments, "--json"]), invoke([*arguments, "--json", "--quiet"])
    (folder / "grid.png").unlink()
    assert json.loads(loud.stdout)["count"] == 1 and loud.stderr == "sampling\n"
    assert json.loads(quiet.stdout) == json.loads(loud.stdout) and quiet.stderr == ""
    shown = invoke([*arguments, "-v"])
    (folder / "grid.png").unlink()
    first, *rest = shown.stderr.splitlines()
    assert first.startswith("edadm-compile 0.") and "torch 2." in first
    assert rest[0] == "sampling" and rest[1].startswith("  sampling: ")
    assert invoke([*arguments, "--quiet"]).output == ""
    (folder / "grid.png").unlink()


# completion


def completions(arguments, incomplete):
    shell = ShellComplete(main, {}, NAME, "_EDADM_COMPILE_COMPLETE")
    return [(item.type, item.value) for item in shell.get_completions(arguments, incomplete)]


def test_completion_of_verbs_options_values_and_files():
    assert completions([], "ins") == [("plain", "inspect")]
    assert completions([], "mod") == [("file", "mod")]  # the default verb takes a file
    assert ("plain", "--method") in completions([], "--me")
    assert completions(["model.pt", "--method"], "q") == [("plain", "q-diffusion")]
    assert completions(["compile", "model.pt", "--targ"], "--targ") == [("plain", "--targets")]
    assert completions(["inspect"], "x") == [("file", "x")]
    assert completions(["completion"], "z") == [("plain", "zsh")]


@pytest.mark.parametrize(("shell", "mark"), [("bash", "complete -o nosort -F"), ("zsh", "#compdef edadm-compile"), ("fish", "complete --no-files --command edadm-compile")])  # fmt: skip
def test_completion_scripts(invoke, shell, mark):
    done = invoke(["completion", shell])
    assert done.exit_code == 0 and mark in done.stdout and "_EDADM_COMPILE_COMPLETE" in done.stdout


# progress


def test_lines_have_no_control_codes_and_show_what_is_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = progress.LineProgress()
    lines.stage("reconstruct", 100)
    lines.advance(10, "block 1/9 stem loss 1.00e-02")
    now[0] = 20.0
    lines.advance(10, "block 2/9 mid loss 2.00e-02")
    lines.advance(0, "a result of a block")
    lines.advance(0, "warning: something")
    lines.stage("quality", None)
    out = capsys.readouterr().err.splitlines()
    assert out[0] == "reconstruct" and out[2:] == ["warning: something", "quality"]
    assert out[1].startswith("  reconstruct 20 %, block 2/9 mid loss 2.00e-02, about 80 s left, ")
    assert out[1].endswith(" GB") and "\x1b" not in "".join(out)


def test_detail_adds_results_and_times(capsys):
    lines = progress.LineProgress(verbose=True)
    lines.stage("ranges", 1)
    lines.advance(0, "block 1/1 mid loss 1.0e-01 → 1.0e-02")
    lines.finish()
    out = capsys.readouterr().err.splitlines()
    assert out[1] == "  block 1/1 mid loss 1.0e-01 → 1.0e-02" and out[2].startswith("  ranges: ")


def test_bars_show_stage_block_and_memory():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=150)
    with Progress(*progress._columns(), console=console) as bars:
        shown = progress.BarProgress(bars, verbose=True)
        shown.stage("reconstruct", 10)
        shown.advance(5, "block 1/2 mid loss 3.00e-02")
        bars.refresh()
        shown.advance(0, "warning: all weights are 0")
        shown.stage("quality", None)
        shown.finish()
    out = text.getvalue()
    assert "block 1/2 mid loss 3.00e-02" in out and " GB" in out and "warning: all weights are 0" in out
    assert "reconstruct: " in out


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for term, expected in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert progress.on_terminal() is expected


def test_memory_of_this_process():
    assert 10e6 < memory.resident_bytes() < 100e9


def test_a_warning_is_kept_once_and_told_at_once():
    told = []

    class Listener:
        def stage(self, name, total):
            pass

        def advance(self, steps=1, message=""):
            told.append((steps, message))

    context = Context(small_config(), progress=Listener())
    context.warn("x")
    context.warn("x")
    assert context.all_warnings() == ["x"] and told == [(0, "warning: x")]
    context.stats["calibrate"] = {"warnings": ["y", "x"]}
    assert context.all_warnings() == ["y", "x"]


def test_own_warnings_are_a_sentence(capsys):
    from edadm_compile.cli.failures import calm_warning

    calm_warning("slow engine", RuntimeWarning, "a.py", 3)
    assert capsys.readouterr().err == "warning: slow engine\n"


def test_json_knows_no_infinity(capsys):
    from edadm_compile.cli.options import print_json

    with click.Context(main):
        print_json({"a": [float("inf"), float("nan"), 1.5], "b": (1,)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": [1]}
