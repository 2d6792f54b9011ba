"""Screenshots of the documentation: the report and the summary of a real compilation of the digits example.

    python benchmarks/docs/screenshots.py             compile with default settings, write docs/images
    python benchmarks/docs/screenshots.py --quick     the same with few steps, to try the command out

The summary is what the command prints, as SVG. The page is opened in Chromium through playwright
(pip install 'edadm-compile[browser]'; Chromium from the system, or `playwright install chromium`).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
#: Characters of a line in the picture of the terminal.
_COLUMNS = 118
#: Largest size of a picture in bytes.
_LARGEST = 400_000
#: Pictures of the page: name, colours, width and height of the window, first section shown.
_VIEWS = (
    ("report-light.png", "light", 1280, 1180, None),
    ("report-dark.png", "dark", 1280, 1180, None),
    ("report-phone.png", "light", 390, 1180, None),
    ("report-ranges.png", "light", 1280, 560, "ranges"),
    ("report-layers.png", "light", 1280, 720, "layers"),
)


def main() -> None:
    """Compile, take the pictures, say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few reconstruction steps and samples, no GPU code")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder for the pictures")
    wanted = parser.parse_args()
    wanted.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        printed = compile_digits(folder, quick=wanted.quick)
        (wanted.output / "summary.svg").write_text(terminal(printed))
        photograph(folder / "unet.html", wanted.output)
    for path in sorted(wanted.output.iterdir()):
        print(f"{path}: {path.stat().st_size} bytes")


def compile_digits(folder: Path, *, quick: bool) -> str:
    """Run the command in `folder`; returns what it printed, with colours."""
    shutil.copy(ROOT / "examples" / "digits" / "model.pt", folder)
    options = ["--iters", "2", "--calib-samples", "16", "--targets", "none"] if quick else []
    command = [sys.executable, "-m", "edadm_compile", "model.pt", "-o", "unet.qmod", "--report", "unet.html", *options]
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(_COLUMNS), "TERM": "xterm-256color"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def terminal(printed: str) -> str:
    """What a command printed as SVG, in the reader's own monospaced font."""
    console = Console(record=True, width=_COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ edadm-compile model.pt -o unet.qmod --report unet.html", style="bold"))
    console.print(Text.from_ansi(printed.rstrip()))
    svg = console.export_svg(title="edadm-compile", unique_id="summary")
    return re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL)  # these would be fetched


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def photograph(page_file: Path, output: Path) -> None:
    """Pictures of a page in both colours and on a telephone."""
    with chromium() as browser:
        for name, scheme, width, height, section in _VIEWS:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(page_file.as_uri())
            if section is not None:
                page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
                page.evaluate("document.querySelector('nav').style.display = 'none'")
            page.screenshot(path=output / name)
            page.close()
            shrink(output / name)


def shrink(path: Path) -> None:
    """Fewer colours, which flat pictures do not miss.

    Raises:
        SystemExit: the picture is still too large to be committed.
    """
    picture = Image.open(path).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > _LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size} bytes, allowed are {_LARGEST}")


if __name__ == "__main__":
    main()
