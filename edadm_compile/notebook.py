"""Small tables for notebooks: what ``_repr_html_`` of results returns."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    """An HTML table of names and values; both are escaped, colours are the notebook's own."""
    body = "".join(
        f'<tr><th scope="row" style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f'<table><caption style="text-align:left;font-weight:bold">{escape(title)}</caption><tbody>{body}</tbody></table>'
