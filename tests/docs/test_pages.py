"""Every code block of the documentation, README.md, CONTRIBUTING.md and the READMEs of the folders is executed."""

import time
from pathlib import Path

import pytest

from tests.docs.markdown import blocks

ROOT = Path(__file__).parents[2]


def _pages():
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    found += [*(ROOT / "examples").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), ROOT / "tests" / "README.md"]
    return sorted(str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("name", _pages())
def test_every_block_runs(name, page):
    found = blocks(ROOT / name, name)
    if not found:
        return
    state = page(name)
    for block in found:
        start = time.perf_counter()
        state.run(block)
        print(f"{block} {block.language}: {time.perf_counter() - start:.1f} s")
    state.finish()
