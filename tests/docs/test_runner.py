"""The runner of the pages finds what is wrong with a page."""

import pytest

from tests.docs import diffs, reuse, shims
from tests.docs.markdown import blocks
from tests.docs.runner import Page, PageError


def _run(tmp_path, text, environment=None):
    (tmp_path / "page.md").write_text(text)
    page = Page(tmp_path, environment or {"PATH": "/usr/bin:/bin"})
    for block in blocks(tmp_path / "page.md", "page.md"):
        page.run(block)
    page.finish()
    return page


WRONG = {
    "a command that fails": ("```bash\nfalse\n```", "exits with 1"),
    "the first of two commands fails": ("```bash\nfalse | cat\ntrue\n```", "exits with 1"),
    "other output": ("```console\n$ echo one\ntwo\n```", "prints something else"),
    "output before the wildcard": ("```console\n$ echo one\ntwo\n...\n```", "prints something else"),
    "no language": ("```\nedadm-compile x\n```", "language '' in place of bash"),
    "an unknown language": ("```sql\nselect\n```", "language 'sql'"),
    "code as text": ("```text\nedadm-compile model.pt\n```", "holds code"),
    "bad JSON": ("```json\n{\n```", "is not json"),
    "bad TOML": ("```toml\na =\n```", "is not toml"),
    "a file that nothing uses": ('```python title="alone.py"\nx = 1\n```', "no later block uses alone.py"),
    "no command in a console": ("```console\nedadm-compile\n```", "begins with"),
    "an option that does not exist": (
        "<!-- not run: needs a GPU -->\n```bash\nedadm-compile tune a.qmod --fastest\n```",
        "--fastest",
    ),
    "the default verb's options": (
        "<!-- not run: long -->\n```bash\nedadm-compile a.pt --w3a9\n```",
        "--w3a9",
    ),
    "a make target that does not exist": ("<!-- not run: long -->\n```bash\nmake tea\n```", "no target tea"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_page_is_refused(name, tmp_path):
    text, reason = WRONG[name]
    with pytest.raises(PageError, match=reason):
        _run(tmp_path, text)


def test_python_that_does_not_compile_is_refused_even_when_it_is_not_run(tmp_path):
    with pytest.raises(SyntaxError):
        _run(tmp_path, "<!-- not run: needs a GPU -->\n```python\ndef\n```")


@pytest.mark.parametrize("text", ["```bash\ntrue\n", "<!-- not run: why -->\n\ntext\n```bash\ntrue\n```"])
def test_open_fences_and_markers_without_a_fence(text, tmp_path):
    with pytest.raises(ValueError):
        _run(tmp_path, text)


def test_a_marker_without_a_reason_is_none(tmp_path):
    with pytest.raises(PageError, match="exits with 1"):
        _run(tmp_path, "<!-- not run: -->\n```bash\nfalse\n```")


def test_blocks_share_a_folder_and_variables(tmp_path):
    page = _run(
        tmp_path,
        '1. first\n\n   ```json title="a.json"\n   {"a": 1}\n   ```\n\n'
        "```bash\ncat a.json > b\nS='x y'\n```\n```console\n$ echo \"$S\"; cat b\nx y\n...\n```\n",
    )
    assert page.written == {"a.json": True} and (tmp_path / "b").read_text() == '{"a": 1}\n'


DIFF = "--- a/f.py\n+++ b/f.py\n@@ somewhere\n one\n-two\n+2\n+3\n"


def test_a_diff_is_applied_by_its_lines(tmp_path):
    (tmp_path / "f.py").write_text("zero\none\ntwo\n    one\nfour\n")
    assert diffs.apply(tmp_path, DIFF) == ["f.py"]
    assert (tmp_path / "f.py").read_text() == "zero\none\n2\n3\n    one\nfour\n"


@pytest.mark.parametrize("content", ["one\n", "one\ntwo\none\ntwo\n", " one\ntwo\n"])
def test_a_diff_that_fits_nowhere_or_twice_is_refused(content, tmp_path):
    (tmp_path / "f.py").write_text(content)
    with pytest.raises(PageError, match="these lines occur"):
        _run(tmp_path, f"```diff\n{DIFF}```")


def test_commands_are_reduced_and_nothing_else():
    verbs = ["compile", "verify", "export", "inspect"]
    compiled = shims.reduced(["m.pt", "--w4a8", "--iters", "200", "-o", "a"], verbs)
    assert compiled[:4] == ["m.pt", "--w4a8", "-o", "a"]
    assert dict(zip(compiled[4::2], compiled[5::2], strict=True)) == shims.REDUCED["compile"]
    assert "--targets" not in shims.reduced(["m.pt", "--deploy", "onnxruntime"], verbs)
    assert shims.reduced(["verify", "a", "-n", "8"], verbs) == ["verify", "a", "-n", "1"]
    assert shims.reduced(["export", "a", "--int4"], verbs) == ["export", "a", "--int4"]
    assert shims.reduced(["compile", "--help"], verbs) == ["compile", "--help"]


def test_equal_compilations_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"one")
    made = []

    def run(name, *options):
        def compile():
            made.append(name)
            (tmp_path / name).write_text(f"{len(made)}")
            raise SystemExit(0)

        reuse.compiled(["model.pt", *options, "-o", name], compile)
        return (tmp_path / name).read_text()

    assert [run("a", "--w4a8"), run("b", "--w4a8"), run("c", "--w8a8")] == ["1", "1", "2"]
    (tmp_path / "model.pt").write_bytes(b"other")
    assert run("d", "--w4a8") == "3" and made == ["a", "c", "d"]
    with pytest.raises(SystemExit):  # with a file of settings it is always made: that file may have changed
        run("e", "--w4a8", "--config", "x.toml")


def test_each_command_is_a_process_of_its_own(tmp_path, commands):
    """State of one does not reach the next, exit codes and streams are passed on, pip is refused."""
    text = (
        "```console\n$ python -c \"import os; os.environ['A'] = '1'; print(os.environ.get('B'))\"\nNone\n"
        "$ B=2 python -c \"import os; print(os.environ.get('A'), os.environ['B'])\"\nNone 2\n"
        "$ echo piped | python -c 'print(input())'\npiped\n"
        "$ python -c 'import sys; sys.exit(3)' || echo $?\n3\n"
        "$ pip install x 2>/dev/null || echo refused\nrefused\n```\n"
    )
    _run(tmp_path, text, dict(commands))


def test_a_command_that_prints_a_traceback_fails(tmp_path, commands):
    with pytest.raises(PageError, match="ZeroDivisionError"):
        _run(tmp_path, "```python\n1 / 0\n```", dict(commands))
