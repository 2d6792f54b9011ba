"""Every code block of the documentation, README.md, CONTRIBUTING.md and the READMEs of the folders is executed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _pages():
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    found += [*(ROOT / "examples").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), ROOT / "tests" / "README.md"]
    return sorted(str(path.relative_to(ROOT)) for path in found)


@pytest.mark.parametrize("name", _pages())
def test_every_block_runs(name, outcomes):
    print(*outcomes[name].result(), sep="\n")
