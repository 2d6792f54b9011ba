"""docs/reference/cli.md is what --help says; links lead somewhere; the pictures are those of their file."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


def _tool(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_tool", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_options_is_what_help_says():
    """In a process of its own: click remembers the help option of a verb that another test called without its group."""
    done = subprocess.run([sys.executable, "docs/tools/cli.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_in_the_reference_of_python():
    import edadm_compile

    shown = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8").split()
    assert [n for n in edadm_compile.__all__ if f"edadm_compile.{edadm_compile._HOME[n]}.{n}" not in shown] == []


def test_a_new_option_changes_the_reference(monkeypatch):
    import click

    from edadm_compile.cli.verify import verify

    tool = _tool("docs/tools/cli.py")
    before = tool.page() + tool.guide()
    monkeypatch.setattr(verify, "params", [*verify.params, click.Option(["--sparkle"], help="New.")])
    assert "--sparkle" in tool.page() and "--sparkle" in tool.guide() and "--sparkle" not in before


def test_every_link_leads_somewhere():
    assert _tool("docs/tools/links.py").problems(ROOT) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](missing.md)", "does not exist"),
        ("[a](other.md#no-such)", "no such heading"),
        ("[a](#nowhere)", "no such heading"),
        ("[a](../../etc/passwd)", "leaves the repository"),
        ("[a]()", "is empty"),
    ],
)
def test_links_that_lead_nowhere_are_found(tmp_path, text, reason):
    (tmp_path / "README.md").write_text(f"# Title\n\n`[not](a-link)` [here](#title) [x](other.md#a--b)\n{text}\n")
    (tmp_path / "other.md").write_text("# `--a`: b\n\n# A & b\n```text\n# no heading\n```\n")
    found = _tool("docs/tools/links.py").problems(tmp_path)
    assert len(found) == 1 and found[0].startswith("README.md:4") and reason in found[0]


@pytest.mark.parametrize(
    "link", ["[a]({})", "![a]({})", '<img alt="a" src="{}">', '<source srcset="{}">', '<a href="{}">']
)
@pytest.mark.parametrize(
    ("page", "target", "moved"),
    [
        ("repository/README.md", "docs/images/sqnr.svg", "../images/sqnr.svg"),
        ("repository/README.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("repository/README.md", "https://example.org/a.png", "https://example.org/a.png"),
        ("faq.md", "../README.md", "repository/README.md"),
        ("faq.md", "images/sqnr.svg", "images/sqnr.svg"),
    ],
)
def test_links_out_of_docs_and_back_are_moved(link, page, target, moved):
    hooks = _tool("docs/tools/hooks.py")
    place = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(link.format(target), place) == link.format(moved)


def test_pictures_are_those_of_their_file():
    tool = _tool("benchmarks/docs/pictures.py")
    found = json.loads(tool.RESULTS.read_text())
    assert tool.stale(found) == [], "run python benchmarks/docs/pictures.py draw"
    assert len(tool.stale({**found, "counts": [1]})) == 4
    made = tool.pictures(found)
    assert {name for name, content in made.items() if b"<svg" in content} == {f"{n}.svg" for n in tool._MAKERS}


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "from another place"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "from another place"),
        ('<img src="images/missing.svg">', "does not exist"),
        (
            '<a href="https://arxiv.org/abs/2401.04585">paper</a><img src="data:image/gif;base64,R0"><img src="a%20b.svg">',
            "",
        ),
    ],
)
def test_the_site_loads_nothing_from_elsewhere(tmp_path, element, reason):
    (tmp_path / "a b.svg").write_text("<svg/>")
    (tmp_path / "index.html").write_text(f"<html>{element}</html>")
    found = _tool("docs/tools/site.py").problems(tmp_path)
    assert [reason in sentence for sentence in found] == ([True] if reason else [])
