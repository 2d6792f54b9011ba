"""What the verb ``report`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edadm_compile.report.tables import console, human


def print_report(result: Mapping[str, Any]) -> None:
    """Print what was written, and what the page does not have."""
    out = console()
    out.print(f"→ {result['output']} ({human(result['bytes'])}), one page; open it in a browser", highlight=False)
    if result["data"]:
        out.print(f"data of the plots: {len(result['data'])} JSON files", highlight=False)
    for item in result["missing"]:
        out.print(f"not in it: {item['what'][0].lower()}{item['what'][1:]}: {item['why']}", highlight=False)
