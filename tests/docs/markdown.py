"""The fenced blocks of a Markdown page, and what the page says about running them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

#: A line such as ``<!-- not run: needs a CUDA GPU -->`` directly above a fence, with a reason.
_MARKER = re.compile(r"^<!-- not run: (?P<reason>\S.*\S) -->$")
#: Directly above a Python block that uses names of the one before it.
_GOES_ON = "<!-- goes on -->"
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`]*)$")
_TITLE = re.compile(r'\btitle="(?P<title>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: path of the page, relative to the repository.
        line: line of the opening fence, from 1.
        language: first word of the info string; empty when there is none.
        title: file that the block is the content of, if it says so (``title="name"``).
        text: what is between the fences, without their indentation.
        skipped: the reason of a ``not run`` marker above it, else None.
        goes_on: it is one program with the Python block before it.
    """

    page: str
    line: int
    language: str
    title: str | None
    text: str
    skipped: str | None = field(default=None)
    goes_on: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path, name: str) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        ValueError: a fence that is not closed, or a marker with nothing under it.
    """
    return list(_blocks(path.read_text(encoding="utf-8").splitlines(), name))


def _blocks(lines: list[str], name: str):
    reason: str | None = None
    goes_on = False
    index = 0
    while index < len(lines):
        marker, fence = _MARKER.match(lines[index].strip()), _FENCE.match(lines[index])
        if fence:
            end = _closing(lines, index, fence["ticks"], name)
            body = [line.removeprefix(fence["indent"]) for line in lines[index + 1 : end]]
            title = _TITLE.search(fence["info"])
            language = (fence["info"].split() or [""])[0]
            yield Block(name, index + 1, language, title and title["title"], "\n".join(body) + "\n", reason, goes_on)
            reason, goes_on, index = None, False, end
        elif lines[index].strip() == _GOES_ON:
            goes_on = True
        elif goes_on:
            raise ValueError(f"{name}:{index}: a 'goes on' marker has to stand directly above a fence")
        elif reason is not None:
            raise ValueError(f"{name}:{index}: a 'not run' marker has to stand directly above a fence")
        elif marker:
            reason = marker["reason"]
        index += 1


def _closing(lines: list[str], start: int, ticks: str, name: str) -> int:
    for index in range(start + 1, len(lines)):
        if lines[index].strip() == ticks:
            return index
    raise ValueError(f"{name}:{start + 1}: this fence is never closed")
