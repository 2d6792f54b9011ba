"""MkDocs hooks: pages that the navigation does not name, and links to files outside docs/."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation

ROOT = Path(__file__).resolve().parents[2]
#: Where files of the repository outside docs/ are put in the site.
_OUTSIDE = "repository"
#: A link or picture of Markdown, or of an HTML element in it.
_LINK = re.compile(
    r"(?P<start>\]\(|\b(?:src|srcset|href)=\")(?P<target>[^()\s#\"]+)(?P<anchor>#[^()\s\"]*)?(?P<end>[)\"])",
)


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside docs/, and what those files link to, under repository/."""
    waiting = [(page.src_uri, Path(str(page.abs_src_path))) for page in files.documentation_pages()]
    while waiting:
        uri, path = waiting.pop()
        for target in _LINK.finditer(path.read_text(encoding="utf-8")):
            found = _outside(uri, target["target"])
            if found is None or files.get_file_from_path(f"{_OUTSIDE}/{found}") is not None:
                continue
            added = File.generated(config, f"{_OUTSIDE}/{found}", abs_src_path=str(ROOT / found))
            files.append(added)
            if found.endswith(".md"):
                waiting.append((added.src_uri, ROOT / found))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ to the copies, and those from the copies back."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        found = _outside(here, match["target"])
        if found is None and not here.startswith(f"{_OUTSIDE}/"):
            return match[0]
        goal = f"{_OUTSIDE}/{found}" if found is not None else _inside(here, match["target"])
        if goal is None:
            return match[0]
        path = posixpath.relpath(goal, posixpath.dirname(here) or ".")
        return f"{match['start']}{path}{match['anchor'] or ''}{match['end']}"

    return _LINK.sub(moved, markdown)


def on_nav(nav: Navigation, files: Files, **_: Any) -> Navigation:
    """Put pages of docs/ that no entry names under "More", so that a new page can be found before it has its place."""
    from mkdocs.structure.nav import Section

    named = {page.file.src_uri for page in nav.pages}
    rest = [f for f in files.documentation_pages() if f.src_uri not in named and not f.src_uri.startswith(_OUTSIDE)]
    pages = [file.page for file in rest if file.page is not None]
    if pages:
        nav.items.append(Section("More", pages))
        nav.pages.extend(pages)
    return nav


def _repository_path(uri: str, target: str) -> str | None:
    """Path in the repository that a link of the page `uri` means; None for what is no file there."""
    if re.match(r"[a-z][a-z+.-]*:|/", target):
        return None
    place = uri.removeprefix(f"{_OUTSIDE}/") if uri.startswith(f"{_OUTSIDE}/") else f"docs/{uri}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _outside(uri: str, target: str) -> str | None:
    path = _repository_path(uri, target)
    return path if path is not None and not path.startswith("docs/") else None


def _inside(uri: str, target: str) -> str | None:
    path = _repository_path(uri, target)
    return path.removeprefix("docs/") if path is not None and path.startswith("docs/") else None
