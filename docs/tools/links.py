"""Check relative links and anchors of the repository's Markdown files, as they are read in the repository itself.

    python docs/tools/links.py

MkDocs checks the site; this checks README.md, CONTRIBUTING.md and every README below, and links that leave docs/.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(
    r"(?<!\\)\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\((?P<target>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)", re.DOTALL
)
_FENCE = re.compile(r"^ *(```+)[^\n]*\n.*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?) *#*$", re.MULTILINE)
_FOLDERS = ("docs", "examples", "benchmarks", "tests", "edadm_compile")


def problems(root: Path) -> list[str]:
    """One sentence for every link that leads nowhere."""
    found = []
    for page in pages(root):
        text = _CODE.sub(_blank, _FENCE.sub(_blank, page.read_text(encoding="utf-8")))
        for match in _LINK.finditer(text):
            reason = _wrong(root, page, match["target"])
            if reason:
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{page.relative_to(root)}:{line}: ({match['target']}) {reason}")
    return found


def pages(root: Path) -> list[Path]:
    """The Markdown files that people read in the repository."""
    nested = [path for folder in _FOLDERS for path in (root / folder).rglob("*.md")]
    return sorted([*root.glob("*.md"), *nested])


def _wrong(root: Path, page: Path, target: str) -> str:
    if not target:
        return "is empty"
    if re.match(r"[a-z][a-z+.-]*:", target):
        return ""  # another site; nothing here asks the network
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if name.startswith("/") or not path.is_relative_to(root):
        return "leaves the repository"
    if not path.exists():
        return "does not exist"
    if anchor and path.suffix == ".md" and anchor not in anchors(path):
        return f"{path.name} has no such heading"
    return ""


@cache
def anchors(path: Path) -> frozenset[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    seen: dict[str, int] = {}
    result = set()
    for match in _HEADING.finditer(_FENCE.sub(_blank, path.read_text(encoding="utf-8"))):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["title"])
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = seen.get(slug, 0)
        seen[slug] = count + 1
        result.add(slug if count == 0 else f"{slug}-{count}")
    return frozenset(result)


def _blank(match: re.Match[str]) -> str:
    """Nothing, with as many lines."""
    return "\n" * match[0].count("\n")


def main() -> int:
    """Exit status."""
    found = problems(ROOT)
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
