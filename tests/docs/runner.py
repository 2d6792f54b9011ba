"""Runs the blocks of one page in a folder, in order."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.docs import diffs
from tests.docs.markdown import Block

#: Formulas, layouts and diagrams: nothing in them is a command or code.
_PROSE = {"text"}
_DATA = {"json": json.loads, "toml": tomllib.loads}
_COMMAND = re.compile(r"^\s*(\$ |edadm-compile\b|python3? |pip |make |import |from \w+ import )")
_LIMIT_S = 1800


class PageError(AssertionError):
    """A block that is wrong, with its place."""


@dataclass
class Page:
    """State of one page while its blocks run.

    Attributes:
        folder: working folder of all blocks.
        environment: of every command.
        variables: shell variables that a block set, for the blocks after it.
        written: files that blocks with a title made, and whether something has used them.
    """

    folder: Path
    environment: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict)
    written: dict[str, bool] = field(default_factory=dict)

    def run(self, block: Block) -> None:
        """Execute a block, or check what can be checked without executing it.

        Raises:
            PageError: the block fails, prints something else than it says, or cannot be told apart from text.
        """
        for name in self.written:
            stem = Path(name).stem
            self.written[name] = self.written[name] or re.search(rf"\b{re.escape(stem)}\b", block.text) is not None
        if block.skipped is not None:
            check_unexecuted(block)
        elif block.title is not None and block.language != "console":
            self._write(block)
        elif block.language in ("bash", "sh"):
            self._shell(block, block.text)
        elif block.language == "console":
            for command, expected in sessions(block):
                compare(block, command, expected, self._shell(block, command))
        elif block.language == "python":
            self._script(block)
        elif block.language == "diff":
            self._change(block)
        elif block.language in _DATA:
            parse(block)
        else:
            check_prose(block)

    def finish(self) -> None:
        """After the last block: every file that the page shows has been used."""
        unused = [name for name, used in self.written.items() if not used]
        if unused:
            raise PageError(f"no later block uses {', '.join(unused)}")

    def _write(self, block: Block) -> None:
        assert block.title is not None
        if block.language in _DATA:
            parse(block)
        path = self.folder / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        self.written[block.title] = False

    def _change(self, block: Block) -> None:
        try:
            diffs.apply(self.folder, block.text)
        except (ValueError, OSError) as error:
            raise PageError(f"{block}: {error}") from error

    def _script(self, block: Block) -> None:
        script = self.folder / f"_block_{block.line}.py"
        script.write_text(block.text)
        self._process(block, ["python", script.name])

    def _shell(self, block: Block, text: str) -> str:
        """Run in bash; plain assignments stay for the page's later blocks."""
        settings = "".join(f"{name}={shlex.quote(value)}\n" for name, value in self.variables.items())
        printed = self._process(block, ["bash", "-euo", "pipefail", "-c", settings + text])
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if len(words) == 1 and re.match(r"^[A-Za-z_]\w*=", words[0]):
                name, _, value = words[0].partition("=")
                self.variables[name] = value
        return printed

    def _process(self, block: Block, command: list[str]) -> str:
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, complaints = process.communicate(timeout=_LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise PageError(
                f"{block} exits with {process.returncode}:\n{block.text}\n{printed[-3000:]}\n{complaints[-3000:]}"
            )
        return printed


def run_page(page: Page, blocks: Iterable[Block]) -> list[str]:
    """Run all blocks of a page in order; returns a line for each with its seconds.

    Raises:
        PageError: a block is wrong, or a file that the page shows is not used.
    """
    told = []
    for block in programs(blocks):
        start = time.perf_counter()
        page.run(block)
        told.append(f"{block} {block.language}: {time.perf_counter() - start:.1f} s")
    page.finish()
    return told


def programs(blocks: Iterable[Block]) -> list[Block]:
    """The blocks of a page, with Python that goes on joined to what it goes on from.

    Raises:
        PageError: nothing is there to go on from.
    """
    joined: list[Block] = []
    for block in blocks:
        if not block.goes_on:
            joined.append(block)
            continue
        place = next((i for i in reversed(range(len(joined))) if joined[i].language == "python"), None)
        if place is None or block.language != "python":
            raise PageError(f"{block}: no Python block in front of it to go on from")
        joined[place] = replace(joined[place], text=joined[place].text + "\n\n" + block.text)
    return joined


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """Commands of a console block (lines that begin with ``$ ``) and what the page says they print."""
    if not block.text.startswith("$ "):
        raise PageError(f"{block}: a console block begins with '$ ' and a command")
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


def compare(block: Block, command: str, expected: str, printed: str) -> None:
    """The output is the one on the page; a line ``...`` there stands for any number of lines."""
    if not expected.strip():
        return
    pattern = r"(?:.*\n)*?".join(re.escape(part) for part in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE))
    if not re.fullmatch(pattern, printed):
        raise PageError(f"{block}: `{command}` prints something else than the page says:\n{printed}")


def parse(block: Block) -> None:
    """JSON and TOML blocks are what they say."""
    try:
        _DATA[block.language](block.text)
    except ValueError as error:
        raise PageError(f"{block} is not {block.language}: {error}") from error


def check_prose(block: Block) -> None:
    """A block that is not executed because its language is no code must not hold any."""
    if block.language not in _PROSE:
        allowed = "bash, console, python, diff, json, toml, or text for what is no code"
        raise PageError(f"{block}: language {block.language!r} in place of {allowed}")
    found = [line for line in block.text.splitlines() if _COMMAND.match(line)]
    if found:
        raise PageError(f"{block}: marked as text, but holds code: {found[0].strip()}")


def check_unexecuted(block: Block) -> None:
    """What is left to check of a block that is not run: Python compiles, verbs, options and make targets exist."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    if block.language in _DATA:
        parse(block)
        return
    for line in re.sub(r"\\\n", " ", block.text).splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["edadm-compile"]:
            check_options(block, words[1:])
        elif words[:1] == ["make"]:
            check_target(block, words[1:])


def check_options(block: Block, arguments: list[str]) -> None:
    """Parse a command line without running it."""
    import click

    from edadm_compile.cli import main

    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        return
    verb = arguments[0] if arguments[0] in main.commands else "compile"
    try:
        words = arguments[1:] if arguments[0] == verb else list(arguments)
        main.commands[verb].make_context(verb, words, help_option_names=["-h", "--help"])
    except click.ClickException as error:
        raise PageError(f"{block}: edadm-compile {shlex.join(arguments)}: {error.format_message()}") from error


def check_target(block: Block, arguments: list[str]) -> None:
    """The Makefile of this repository has the target."""
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    for word in arguments:
        if "=" not in word and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            raise PageError(f"{block}: the Makefile has no target {word}")


def environment(shims: Path, cache: Path, root: Path) -> dict[str, str]:
    """Of the commands of a page: the shims first on PATH, no user settings, 80 columns."""
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR", "TRITON_INTERPRET")}
    own = str(Path(sys.executable).parent)
    return {
        **kept,
        "PATH": os.pathsep.join([str(shims), own, "/usr/bin", "/bin"]),
        "PYTHONPATH": str(root),
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
