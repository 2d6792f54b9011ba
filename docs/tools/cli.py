"""Write docs/reference/cli.md, and the help blocks of docs/cli.md, from the help of every verb.

python docs/tools/cli.py          write them
python docs/tools/cli.py --check  exit 1 when they are not what the help says
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from edadm_compile.cli import main as program

DOCS = Path(__file__).resolve().parents[1]
PAGE = DOCS / "reference" / "cli.md"
GUIDE = DOCS / "cli.md"
_BLOCK = re.compile(
    r"(?P<head>```console\n\$ (?P<names>edadm-compile[^\n]*?) --help\n).*?(?=^```$)", re.DOTALL | re.MULTILINE
)
_HEAD = """# Options

Written by `python docs/tools/cli.py` from `--help`; do not edit. What the verbs do and print is in
[Command line](../cli.md).
"""


def page() -> str:
    """The whole page as Markdown; lines are as in a terminal of 80 columns (click keeps two free)."""
    sections = [_HEAD]
    for names, command in _commands(("edadm-compile",), program):
        title = " ".join(names[1:]) or names[0]
        sections.append(f"## {title}\n\n```text\n{_help(names, command)}\n```\n")
    return "\n".join(sections)


def guide() -> str:
    """docs/cli.md with the blocks that begin with ``$ edadm-compile VERB --help`` made anew."""
    known = dict(_commands(("edadm-compile",), program))

    def block(match: re.Match[str]) -> str:
        names = tuple(match["names"].split())
        return f"{match['head']}{_help(names, known[names])}\n"

    return _BLOCK.sub(block, GUIDE.read_text(encoding="utf-8"))


def _help(names: tuple[str, ...], command: click.Command) -> str:
    context = click.Context(command, info_name=" ".join(names), terminal_width=78)
    context.help_option_names = ["-h", "--help"]
    return command.get_help(context)


def _commands(names: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """A command and, for a group, the visible ones under it, sorted by name as its help lists them."""
    yield names, command
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            if not command.commands[name].hidden:
                yield from _commands((*names, name), command.commands[name])


def main() -> int:
    """Exit status."""
    made = {PAGE: page(), GUIDE: guide()}
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(DOCS.parent)} is not what --help says: run python docs/tools/cli.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
