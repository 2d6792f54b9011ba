"""Apply a diff of a page by its lines, wherever they are: line numbers on a page would be wrong after the next change."""

from __future__ import annotations

import re
from pathlib import Path


def apply(folder: Path, text: str) -> list[str]:
    """Apply every hunk; returns the names of the changed files.

    Raises:
        ValueError: the unchanged and removed lines of a hunk are not in the file, or more than once.
    """
    changed: list[str] = []
    for part in re.split(r"^--- a/.*\n", text, flags=re.MULTILINE)[1:]:
        header, _, body = part.partition("\n")
        name = header.removeprefix("+++ b/")
        path = folder / name
        content = path.read_text()
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            places = [found.start() for found in re.finditer(rf"(?m)^(?={re.escape(before)})", content)]
            if len(places) != 1:
                raise ValueError(f"{name}: these lines occur {len(places)} times:\n{before}")
            content = content[: places[0]] + after + content[places[0] + len(before) :]
        path.write_text(content)
        changed.append(name)
    if not changed:
        raise ValueError("no file in this diff: it begins with '--- a/NAME' and '+++ b/NAME'")
    return changed
