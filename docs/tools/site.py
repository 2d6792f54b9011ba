"""Check a built site: nothing in its pages is loaded from another place, and every picture it shows is there.

python docs/tools/site.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes that make a browser load something while it shows a page.
_LOADS = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "link": ("href",),
    "object": ("data",), "embed": ("src",), "video": ("src", "poster"), "audio": ("src",), "use": ("href",),
}  # fmt: skip
#: ``<link rel=...>`` that says something and loads nothing.
_TOLD = {"canonical", "next", "prev", "alternate"}


class _Loads(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element."""
        values = dict(attrs)
        if tag == "link" and set((values.get("rel") or "").split()) <= _TOLD:
            return
        self.found += [value for name in _LOADS.get(tag, ()) if (value := values.get(name))]


def problems(site: Path) -> list[str]:
    """One sentence for everything that is loaded from elsewhere or does not exist."""
    found = []
    for page in sorted(site.rglob("*.html")):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        for target in loads.found:
            parts = urlsplit(target)
            if parts.scheme == "data":
                continue
            base = site if parts.path.startswith("/") else page.parent
            if parts.scheme or parts.netloc:
                found.append(f"{page.relative_to(site)}: loads {target} from another place")
            elif parts.path and not (base / unquote(parts.path).lstrip("/")).exists():
                found.append(f"{page.relative_to(site)}: {target} does not exist")
    return found


def main() -> int:
    """Exit status."""
    site = Path(sys.argv[1])
    found = problems(site)
    if not (site / "index.html").exists():
        found.append(f"{site} has no index.html: build it with make docs")
    print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
