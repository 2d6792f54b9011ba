"""A compilation from the command line that is stopped: what it says, what it leaves, and that it goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from edadm_compile.cli import main
from edadm_compile.passes.reconstruct import UnitTrainer
from edadm_compile.runtime.artifact import read_manifest
from tests.models.foreign import build

ROOT = Path(__file__).parents[2]
SCHEDULER = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear"}
SETTINGS = 'memory = "1kB"\n[tdac]\ntrajectories = 3\n[reconstruction]\nbatch = 4\n'


@pytest.fixture
def command(tmp_path):
    torch.save(build().state_dict(), tmp_path / "model.pth")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (tmp_path / "small.toml").write_text(SETTINGS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.qmod").write_bytes(b"older")
    return [
        tmp_path / "model.pth", "--factory", "tests.models.foreign:build", "--steps", 3, "--calib-samples", 8,
        "--iters", 2, "--seed", 3, "--targets", "none", "--config", tmp_path / "small.toml", "-o", tmp_path / "out" / "a.qmod",
    ]  # fmt: skip


def _run(command, *more):
    result = CliRunner().invoke(main, [str(a) for a in (*command, *more)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError("traceback") from result.exception
    return result


def _at_block(monkeypatch, number, act):
    """Do something when the block of that number begins."""
    real, seen = UnitTrainer.run, []

    def run(self, ctx, label):
        seen.append(label)
        if len(seen) == number:
            act()
        return real(self, ctx, label)

    monkeypatch.setattr(UnitTrainer, "run", run)


def test_signals_and_a_full_disk_then_the_same_command_again(command, monkeypatch):
    output, work = command[-1], command[-1].with_name("a.qmod.work")
    for number, (signum, word) in enumerate(((signal.SIGTERM, "terminated"), (signal.SIGINT, "interrupted")), 2):
        with monkeypatch.context() as patch:
            _at_block(patch, 2, lambda signum=signum: os.kill(os.getpid(), signum))
            stopped = _run(command)
        assert stopped.exit_code == 128 + signum
        last = stopped.stderr.strip().splitlines()[-1]
        assert last.startswith(f"{word}: no output was written; kept in {work} for a run of the same command: ")
        assert f"ranges and {number - 1} block" in last and output.read_bytes() == b"older"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with monkeypatch.context() as patch:
        real = os.fsync

        def full(descriptor):
            if "reconstruct.joint.004" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")
            real(descriptor)

        patch.setattr(os, "fsync", full)
        failed = _run(command)
    assert failed.exit_code == 10 and "2 blocks from an earlier run" in failed.stderr
    assert "error: cannot keep reconstruct.joint.004 in" in failed.stderr and "No space left on device" in failed.stderr
    assert output.read_bytes() == b"older" and not list(work.rglob(".*"))

    changed = _run(command, "--iters", 3)
    assert changed.exit_code == 10 and "config.reconstruction.iters was 2, is 3" in changed.stderr
    finished = _run(command, "--json")
    assert finished.exit_code == 0, finished.output
    summary = json.loads(finished.stdout)
    assert summary["resumed"]["blocks"] == 4 and summary["resumed"]["seconds"].keys() >= {"calibration", "reconstruct"}
    assert summary["caches"]["limit"] == 1000 >= summary["caches"]["memory_peak"] and summary["caches"]["spilled_peak"]
    assert [p.name for p in output.parent.iterdir()] == ["a.qmod"]
    first = output.read_bytes()
    assert _run(command, "--memory", "1GB", "--json").exit_code == 0 and output.read_bytes() == first
    manifest = read_manifest(output)
    assert manifest["config"]["seed"] == 3
    assert manifest["computed_with"]["threads"] == str(torch.get_num_threads())


def test_a_named_folder_stays_and_restart_empties_it(command):
    work = command[-1].with_name("kept")
    assert _run(command, "--workdir", work, "--quiet").exit_code == 0
    first = command[-1].read_bytes()
    again = _run(command, "--workdir", work, "--json")
    assert json.loads(again.stdout)["resumed"]["blocks"] > 3 and f"resuming from {work}" in again.stderr
    shown = _run(command, "--workdir", work)
    assert "from an earlier run" in shown.stdout and "blocks, " in shown.stdout and "(limit 1.0 kB)" in shown.stdout
    fresh = _run(command, "--workdir", work, "--restart", "--json")
    assert json.loads(fresh.stdout)["resumed"] is None and "resuming" not in fresh.stderr
    assert command[-1].read_bytes() == first


def test_killed_processes_leave_what_the_next_one_needs(tmp_path):
    """The kill test of benchmarks/results, with two moments and a chain of two kills."""
    script, log = ROOT / "benchmarks" / "robustness" / "kill.py", tmp_path / "kill.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", script, "--kills", "2", "--iters", "4", "--seed", "3", "-o", log]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 2 resumed files and the chain's equal the uninterrupted one" in log.read_text()
