"""SIGKILL a compilation at random moments, run the same command again, compare the file with that of one run.

Two experiments with the command line, each process killed without warning:

* single: for each of ``--kills`` moments, spread at random over the processor time that one run takes, a fresh compilation is
  killed there and run again to the end;
* chain: one compilation is killed again and again, each time after a random part of that time, until it gets through.

Moments are processor time of the process, not wall time: other work on the machine does not shift them.

Processes are forked from one that has compiled already, so that the moments fall into the work and not into imports. One
thread computes: what a fork inherits of a pool of threads does not work.

Every file must have the bytes of the uninterrupted run, an older output must stay as it was until then, and nothing
may be left behind. The moments come from ``--seed``. Exit code 1 on the first difference.

    python benchmarks/robustness/kill.py -o kill.log
    python benchmarks/robustness/kill.py --model examples/digits/model.pt -o kill.log -- --w4a8 --iters 10
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

import diffusers
import torch

import edadm_compile.driver.compile
import edadm_compile.report.tables  # noqa: F401
from edadm_compile.cli import main

#: A small UNet with a resolution change, a skip concatenation and attention.
_CONFIG = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip
_OPTIONS = "--w4a8 --iters {iters} --calib-samples 16 --steps 4 --targets none --config {folder}/settings.toml"
#: Most kills of the chain.
_CHAIN = 8


@dataclass
class Trial:
    """Runs of one command into one folder.

    Attributes:
        command: without the output.
        folder: where the output goes.
        log: receives a line for each run.
    """

    command: list[str]
    folder: Path
    log: TextIO
    restored: list[str] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """The file that is compiled."""
        return self.folder / "unet.qmod"

    def run(self, kill_after: float | None) -> tuple[bool, float]:
        """Run the command, or kill it after some seconds of processor time; returns (finished, seconds it took).

        Raises:
            SystemExit: the command failed.
        """
        said = self.folder.with_name("stderr")
        child = os.fork()
        if child == 0:
            self._compile(said)
        while True:
            found, status, usage = os.wait4(child, os.WNOHANG)
            if found:
                break
            if kill_after is not None and _processor_seconds(child) >= kill_after:
                os.kill(child, signal.SIGKILL)
                _, status, usage = os.wait4(child, 0)
                break
            time.sleep(0.002)
        seconds = usage.ru_utime + usage.ru_stime
        if os.WIFSIGNALED(status):
            return False, seconds
        errors = said.read_text()
        if status:
            raise SystemExit(f"{' '.join(self.command)} failed with {os.waitstatus_to_exitcode(status)}:\n{errors}")
        self.restored = [line for line in errors.splitlines() if line.startswith(("resuming", "checkpoint"))]
        return True, seconds

    def _compile(self, said: Path) -> NoReturn:
        """The command line in this process, which ends with it."""
        code = 1
        try:
            sink, log = os.open(os.devnull, os.O_WRONLY), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(log, 2)
            main.main([*self.command, "-o", str(self.output)], standalone_mode=False)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)

    def sha(self) -> str:
        """Digest of the output."""
        return hashlib.sha256(self.output.read_bytes()).hexdigest()

    def left(self) -> str:
        """What is in the folder besides the output, in words."""
        return ", ".join(sorted(p.name for p in self.folder.iterdir() if p != self.output)) or "nothing"

    def tell(self, text: str) -> None:
        """Write a line to the log and to the terminal."""
        print(text, file=self.log, flush=True)
        print(text, flush=True)


def _processor_seconds(process: int) -> float:
    """User and system time of a running process (fields 14 and 15 of proc(5))."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fresh(trial: Trial) -> None:
    shutil.rmtree(trial.folder)
    trial.folder.mkdir()
    trial.output.write_bytes(b"older")


def _check(trial: Trial, expected: str, what: str) -> None:
    found, left = trial.sha(), trial.left()
    said = trial.restored[0].partition(": ")[2] if trial.restored else "from the beginning"
    trial.tell(f"  {what}: sha256 {found[:16]}, {said}; left behind: {left}")
    if found != expected or left != "nothing":
        raise SystemExit(f"{what}: expected sha256 {expected[:16]} and nothing left behind")


def single(trial: Trial, moment: float, expected: str, number: int) -> None:
    """Kill one fresh compilation at a moment, then run it to the end."""
    _fresh(trial)
    while trial.run(moment)[0]:  # faster than the run that was measured
        moment *= 0.8
        _fresh(trial)
    old = trial.output.read_bytes() == b"older"
    if not old and trial.sha() != expected:
        raise SystemExit(f"kill {number}: the output is neither the older one nor the whole new one")
    output = "the older one" if old else "the new one, whole"
    trial.tell(f"kill {number}: after {moment:.2f} s, leaving {trial.left()}; output: {output}")
    trial.run(None)
    _check(trial, expected, "resumed")


def chain(trial: Trial, draw: random.Random, seconds: float, expected: str, limit: int) -> None:
    """Kill one compilation until it gets through."""
    _fresh(trial)
    for number in range(1, limit + 1):
        moment = draw.uniform(0.3, 0.9) * seconds
        if trial.run(moment)[0]:
            break
        trial.tell(f"chain, kill {number}: after {moment:.2f} s, leaving {trial.left()}")
    else:
        trial.run(None)
    _check(trial, expected, "chain")


class _Plain(torch.nn.Module):
    """A diffusers model that takes and returns tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The prediction [B, C, H, W]."""
        result: torch.Tensor = self.model(x, t, return_dict=False)[0]
        return result


def _small_model(folder: Path) -> Path:
    """An exported program: loading it takes less time than capturing, so that more moments fall into the work."""
    torch.manual_seed(0)
    model = _Plain(diffusers.UNet2DModel(**_CONFIG)).eval()
    batch = {0: torch.export.Dim("batch", min=1, max=63)}
    inputs = (torch.zeros(2, 3, _CONFIG["sample_size"], _CONFIG["sample_size"]), torch.zeros(2, dtype=torch.int64))
    torch.export.save(torch.export.export(model, inputs, dynamic_shapes=(batch, batch)), folder / "model.pt2")
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "clip_sample": False}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "settings.toml").write_text("[tdac]\ntrajectories = 4\n[reconstruction]\nbatch = 8\n")
    return folder / "model.pt2"


def experiment() -> None:
    """Run both experiments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, help="default: a small UNet with random weights")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--iters", type=int, default=40, help="where no options are given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--log", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="options of the compilation, behind --")
    found = parser.parse_args()
    draw = random.Random(found.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, found.log.open("w") as log:
        model = found.model or _small_model(Path(name))
        options = found.options or _OPTIONS.format(iters=found.iters, folder=name).split()
        trial = Trial(["compile", str(model), *options], Path(name) / "out", log)
        trial.folder.mkdir()
        trial.tell(f"$ edadm-compile {model.name} {' '.join(options)}".replace(f"{name}/", ""))
        trial.tell(f"torch {torch.__version__}, {torch.get_num_threads()} threads; moments from seed {found.seed}")
        main.main([*trial.command, "-o", str(trial.output), "--quiet"], standalone_mode=False)  # loads what is needed
        expected = trial.sha()
        _fresh(trial)
        _, seconds = trial.run(None)
        _check(trial, expected, "a second run")
        trial.tell(f"uninterrupted: {seconds:.2f} s of processor time, sha256 {expected[:16]}")
        for number in range(1, found.kills + 1):
            single(trial, draw.uniform(0.0, seconds), expected, number)
        chain(trial, draw, seconds, expected, limit=min(found.kills, _CHAIN))
        trial.tell(f"all {found.kills} resumed files and the chain's equal the uninterrupted one")


if __name__ == "__main__":
    experiment()
