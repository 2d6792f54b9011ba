"""Runs many small jobs in forked processes, so that a crash, a hang or too much memory takes one job only.

The parent has imported everything; a child is a fork of it and does jobs until one ends it. It writes the number of the job
it begins into shared memory, so that the parent knows which one that was.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

#: CPU seconds of one job.
HANG = 5.0
#: Jobs that one child does: what libraries cache does not pile up.
_PER_CHILD = 1000


def run(jobs: range, job: Callable[[int], Any]) -> Iterator[tuple[int, Any]]:
    """Do `job(number)` for every number.

    Yields:
        (number, what the job returned, or a text: "hang", "crash: SIGNAL").
    """
    cell = mmap.mmap(-1, 8)
    at = jobs.start
    while at < jobs.stop:
        last = min(at + _PER_CHILD, jobs.stop)
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(source)
            _serve(range(at, last), job, cell, sink)
        os.close(sink)
        done = at
        with os.fdopen(source, "rb") as stream:
            while True:
                try:
                    number, result = pickle.load(stream)
                except EOFError:
                    break
                done = number + 1
                yield number, result
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            at = last
            continue
        (number,) = struct.unpack("<q", cell[:8])
        signal_number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        name = signal.Signals(signal_number).name if signal_number else f"exit {os.WEXITSTATUS(status)}"
        yield max(number, done), "hang" if name == "SIGPROF" else f"crash: {name}"
        at = max(number, done) + 1


def _serve(jobs: range, job: Callable[[int], Any], cell: mmap.mmap, sink: int) -> None:
    code = 1
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with os.fdopen(sink, "wb") as stream:
            for number in jobs:
                cell[:8] = struct.pack("<q", number)
                signal.setitimer(signal.ITIMER_PROF, HANG)
                result = job(number)
                signal.setitimer(signal.ITIMER_PROF, 0)
                pickle.dump((number, result), stream)
                stream.flush()
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


class AddressSpace:
    """A bound on what the process may allocate from here on, lifted at the end."""

    def __init__(self, room: int) -> None:
        self._room = room

    def __enter__(self) -> None:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * mmap.PAGESIZE + self._room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
