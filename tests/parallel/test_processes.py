"""Two processes under torchrun, on this machine: one result, one message."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.runtime.session import load
from tests.graphs import DDIM, TinyUNet
from tests.parallel.worker import CASES, constants, difference

ROOT = Path(__file__).parents[2]


def torchrun(*command, timeout=300):
    """Run a module in two processes as a user does."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *map(str, command)]
    return _finished([_started(launch)], timeout)[0]


def pair(*command, timeout=300):
    """The same without torchrun, which would end the second process itself when the first one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    launch = ["-m", *map(str, command)]
    return _finished([_started(launch, **meeting, RANK=str(rank)) for rank in range(2)], timeout)


def _started(arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def _finished(processes, timeout):
    """Results of processes; none of them, nor what they started, is left behind."""
    try:
        told = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGTERM)
    return [subprocess.CompletedProcess(p.args, p.returncode, *t) for p, t in zip(processes, told, strict=True)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel") / "out.json"
    for done in pair("tests.parallel.worker", out):
        assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_arrive_at_what_one_arrives_at(compared, case):
    found = compared[case]
    apart, integers = found["constants"]
    assert apart < 1e-4 and integers == 0
    assert found["losses"] < 1e-3  # an output code on a tie may fall either way
    assert found["same_everywhere"] and found["allocation"]
    assert abs(found["sqnr"][0] - found["sqnr"][1]) < 0.01


@pytest.fixture
def options(tmp_path):
    """A model file, and how the command line reads it."""
    torch.save(TinyUNet().state_dict(), tmp_path / "tiny.pt")
    (tmp_path / "scheduler.json").write_text(json.dumps(DDIM))
    return [
        tmp_path / "tiny.pt", "--w4a8", "--factory", "tests.graphs:TinyUNet", "--shape", "3,8,8", "--steps", "4",
        "--iters", "3", "--calib-samples", "9", "--targets", "none", "--scheduler", tmp_path / "scheduler.json",
    ]  # fmt: skip


def test_the_command_line_writes_one_file_and_one_summary(options, tmp_path):
    done = torchrun("edadm_compile", *options, "-o", tmp_path / "two.qmod", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "two.qmod")
    alone = CliRunner().invoke(main, [*map(str, options), "-o", str(tmp_path / "one.qmod"), "--quiet"])
    assert alone.exit_code == 0, alone.output
    one, two = (load(tmp_path / f"{name}.qmod", engine="reference").artifact.qdq for name in ("one", "two"))
    apart, integers = difference(constants(one), constants(two))
    assert apart < 1e-4 and integers == 0


@pytest.mark.parametrize(
    ("command", "codes", "word"),
    [
        (("edadm_compile", "missing.pt", "--w4a8"), (2, 2), "missing.pt does not exist"),  # both have this error
        (("tests.parallel.lonely", "fails"), (11, 5), "only the second process"),
        (("tests.parallel.lonely", "killed"), (11, -signal.SIGKILL), "another process of this run ended"),
    ],
    ids=("of both", "of one", "of none"),
)
def test_an_error_is_said_once_and_ends_every_process(command, codes, word):
    done = pair(*command, timeout=120)
    said = [line for process in done for line in process.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and word in said[0], [process.stderr for process in done]
    assert tuple(process.returncode for process in done) == codes
