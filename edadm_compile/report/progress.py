"""Progress on a terminal (bars) and elsewhere (calm lines)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from edadm_compile.passes.base import Progress as ProgressProtocol
from edadm_compile.passes.base import Silent

#: Seconds between plain lines of one stage when not on a terminal.
_QUIET_TIME = 15.0


class BarProgress:
    """One bar per stage with time left and the latest remark."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None) -> None:
        """Finish the running bar and start one for `name`."""
        self.finish()
        self._task = self._bars.add_task(name, total=total, message="")

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.update(self._task, advance=steps, message=message[-70:])

    def finish(self) -> None:
        """Fill the running bar (early-stopped stages do less than announced)."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            total = task.total if task.total is not None else 1
            self._bars.update(self._task, total=total, completed=total, message="")
            self._task = None


class LineProgress:
    """A line when a stage begins and one every quarter of a minute."""

    def __init__(self) -> None:
        self._name, self._total, self._done, self._start, self._last = "", 0, 0, 0.0, 0.0

    def stage(self, name: str, total: int | None) -> None:
        """Announce a stage."""
        self._name, self._total, self._done = name, total or 0, 0
        self._start = self._last = time.monotonic()
        print(name, file=sys.stderr, flush=True)

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Count, and print now and then."""
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _QUIET_TIME and self._total:
            self._last = now
            left = (now - self._start) * max(0, self._total - self._done) / max(1, self._done)
            print(
                f"  {self._name} {100 * self._done // self._total} % {message}, about {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def reporter(quiet: bool) -> Iterator[ProgressProtocol]:
    """The progress display that fits where output goes (always standard error)."""
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LineProgress()
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[message]}"),
    )
    with Progress(*columns, console=console) as bars:
        progress = BarProgress(bars)
        yield progress
        progress.finish()
