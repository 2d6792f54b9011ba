"""What surrounds the work of a compilation: its working folder, its memory, its threads, and being stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edadm_compile.config import load_config
from edadm_compile.driver.workdir import Workdir
from edadm_compile.errors import EdadmError, InputError, Stopped
from edadm_compile.passes.caches import Caches
from edadm_compile.passes.checkpoint import Checkpoints

_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}, **{f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}}  # fmt: skip


#: Where sentences go that no command line shows.
LOG = logging.getLogger("edadm_compile").warning


@dataclass(frozen=True)
class WorkOptions:
    """How a compilation works, apart from what it computes.

    Attributes:
        folder: for checkpoints and spilled caches; None keeps nothing.
        keep: leave the folder after success.
        restart: discard what an earlier run left there.
        memory: most bytes of caches in memory; None for no limit.
        threads: threads that compute; None for torch's setting. The last bits of a result depend on it.
        say: receives sentences for the user besides progress: what is resumed, what was damaged.
    """

    folder: Path | None = None
    keep: bool = False
    restart: bool = False
    memory: int | None = None
    threads: int | None = None
    say: Callable[[str], None] = LOG


@dataclass(frozen=True)
class Session:
    """What `compile_source` gets of it."""

    workdir: Workdir | None
    caches: Caches

    @property
    def checkpoints(self) -> Checkpoints | None:
        """The working folder, if there is one."""
        return self.workdir

    def report(self, restored: dict[str, float]) -> dict[str, Any]:
        """Entries of the summary: what came from an earlier run, and the caches.

        Args:
            restored: seconds that this had taken, by stage (`edadm_compile.pipeline.CompileResult.restored`).
        """
        names = {} if self.workdir is None else self.workdir.restored
        resumed = {
            "blocks": sum(name.startswith("reconstruct.") for name in names),
            "seconds": {stage: round(spent, 1) for stage, spent in restored.items()},
            "total_seconds": round(sum(restored.values()), 1),
        }
        return {"resumed": resumed if names else None, "caches": self.caches.report()}


@contextlib.contextmanager
def session(options: WorkOptions, inputs: dict[str, Any]) -> Iterator[Session]:
    """Surround a compilation.

    Args:
        inputs: what its result depends on (`edadm_compile.driver.fingerprint.inputs_of`).

    Raises:
        ResourceError: the folder cannot be used.
        ResumeError: it holds a compilation with other inputs.
        Stopped: SIGINT or SIGTERM came; the message says what was kept.
    """
    if options.memory is not None and options.folder is None:
        raise InputError("memory: a limit needs a working folder (workdir), where caches beyond it go")
    with contextlib.ExitStack() as stack:
        stack.enter_context(computing_with(options.threads))
        if options.folder is None:
            yield Session(None, Caches())
            return
        workdir = stack.enter_context(_working(options.folder, options.say, keep=options.keep))
        workdir.claim(inputs, restart=options.restart)
        yield Session(workdir, Caches(options.memory, workdir.spill))


@contextlib.contextmanager
def _working(folder: Path, say: Callable[[str], None], *, keep: bool) -> Iterator[Workdir]:
    """A working folder for the time of a compilation.

    Args:
        keep: leave it after success.

    Raises:
        Stopped: on SIGINT or SIGTERM, with what was kept.
    """
    workdir = Workdir(folder, say)
    try:
        yield workdir
    except KeyboardInterrupt as error:
        kept, signum = workdir.kept(), getattr(error, "signum", signal.SIGINT)
        what = "terminated" if signum == signal.SIGTERM else "interrupted"
        then = f"no output was written; kept in {folder} for a run of the same command: {kept}"
        raise Stopped(f"{what}: {then if kept else 'nothing was written'}", signum) from None
    except EdadmError:
        if kept := workdir.kept():
            say(f"kept in {folder} for a run of the same command: {kept}")
        raise
    else:
        if not keep:
            workdir.remove()
    finally:
        workdir.close()


@contextlib.contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """So many threads for a while; None leaves torch's setting.

    Raises:
        InputError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads: got {threads}, must be at least 1")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if threads is None else threads)
        yield
    finally:
        torch.set_num_threads(before)


def default_folder(output: Path) -> Path:
    """The working folder beside an output file."""
    return output.with_name(f"{output.name}.work")


def memory_limit(given: int | str | None, config_file: Path | None = None) -> int | None:
    """Bytes of a memory option, else of ``memory`` in the settings file, else None.

    Raises:
        InputError: not a size.
    """
    if given is None and config_file is not None:
        given = load_config(config_file).get("memory")
    return None if given is None else parse_memory(given)


def parse_memory(text: Any) -> int:
    """``4GB``, ``512MiB`` or a number of bytes, as bytes; 0 spills everything.

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(text).lower())
    if found is None or found[2] not in _UNITS or isinstance(text, bool):
        raise InputError(f"memory: got {text!r}, expected a size such as 4GB, 512MiB or 1.5GB")
    size: int = math.floor(float(found[1]) * _UNITS[found[2]])
    return size
