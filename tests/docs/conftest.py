"""What the pages are run with: one process that forks, and a folder for each page."""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.docs import runner, shims
from tests.docs.markdown import blocks

ROOT = Path(__file__).parents[2]
#: Pages that tell the reader to add files to the package: they get a copy of it, the others only the example.
WITH_SOURCES = ("docs/writing_a_pass.md", "docs/adding_a_kernel.md")
_SOURCES = ("edadm_compile", "tests", "pyproject.toml")


@pytest.fixture(scope="session")
def tiny_example(tmp_path_factory):
    """`examples/digits` with a network of random weights in place of the trained one: same inputs, file format, sampler.

    The trained one takes 20 s to compile with any settings; tests/e2e compiles it.
    """
    import diffusers

    folder = tmp_path_factory.mktemp("example") / "digits"
    shutil.copytree(ROOT / "examples" / "digits", folder, ignore=shutil.ignore_patterns("__pycache__", "model.pt"))
    checkpoint = torch.load(ROOT / "examples" / "digits" / "model.pt", weights_only=True)
    config = {
        **checkpoint["model"]["config"],
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": False,
    }
    torch.manual_seed(0)
    state = diffusers.UNet2DModel(**config).state_dict()
    model = {**checkpoint["model"], "config": config}
    torch.save({**checkpoint, "model": model, "state_dict": state, "sampler": {"steps": 4}}, folder / "model.pt")
    return folder


@pytest.fixture(scope="session")
def commands():
    """Folder of executables, each of which runs in a fork of one server."""
    home = Path(tempfile.mkdtemp(prefix="pages"))  # a socket's path has to be short
    shims.write(home / "bin", home / "socket")
    environment = runner.environment(home / "bin", home / "cache", ROOT)
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.docs.server", str(home / "socket")],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == "ready\n"
        yield environment
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def outcomes(request, tmp_path_factory, commands, tiny_example):
    """By name, the future of every page that a test was selected for; they run beside each other, one per core."""
    names = {item.callspec.params["name"] for item in request.session.items if "outcomes" in item.fixturenames}

    def run(name: str) -> list[str]:
        folder = tmp_path_factory.mktemp("page")
        shutil.copytree(tiny_example, folder / "examples" / "digits")
        for source in _SOURCES if name in WITH_SOURCES else ():
            copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
            copy(ROOT / source, folder / source)
        return runner.run_page(runner.Page(folder, dict(commands)), blocks(ROOT / name, name))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, name) for name in sorted(names, key=_longest_first)}


def _longest_first(name: str) -> tuple[int, str]:
    """Pages with many commands begin, so that none of them is alone at the end."""
    return -(ROOT / name).read_text(encoding="utf-8").count("\nedadm-compile "), name
