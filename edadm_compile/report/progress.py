"""Progress on a terminal (bars) and elsewhere (calm lines), always on standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn
from rich.table import Column
from rich.text import Text

from edadm_compile.passes.base import Progress as ProgressProtocol
from edadm_compile.passes.base import Silent, is_warning
from edadm_compile.report.memory import memory_text
from edadm_compile.report.versions import version_line

#: Seconds between plain lines of one stage when not on a terminal.
_QUIET_TIME = 15.0


class MemoryColumn(ProgressColumn):
    """Memory of the process beside the running stage."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        """Nothing beside finished stages, whose memory is no longer known."""
        return Text("" if task.finished else memory_text(), style="dim")


class BarProgress:
    """One bar per stage with time left, memory and the latest remark, such as the block and its loss."""

    def __init__(self, bars: Progress, verbose: bool = False) -> None:
        self._bars, self._verbose = bars, verbose
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None) -> None:
        """Finish the running bar and start one for `name`."""
        self.finish()
        self._task = self._bars.add_task(name, total=total, message="")

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Move the bar; a remark of its own goes above the bars."""
        if steps == 0:
            self._remark(message)
        elif self._task is not None:
            self._bars.update(self._task, advance=steps, message=message)

    def _remark(self, message: str) -> None:
        if is_warning(message):
            self._bars.console.print(Text(message, style="yellow"))
        elif self._verbose:
            self._bars.console.print(Text(f"  {message}", style="dim"))

    def finish(self) -> None:
        """Fill the running bar (early-stopped stages do less than announced)."""
        if self._task is not None:
            task = next(t for t in self._bars.tasks if t.id == self._task)
            total = task.total if task.total is not None else 1
            self._bars.update(self._task, total=total, completed=total, message="")
            if self._verbose and task.elapsed is not None:
                self._remark(f"{task.description}: {task.elapsed:.1f} s, {memory_text()}")
            self._task = None


class LineProgress:
    """A line when a stage begins and one every quarter of a minute, without control codes."""

    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._name, self._total, self._done, self._start, self._last = "", 0, 0, 0.0, 0.0

    def stage(self, name: str, total: int | None) -> None:
        """Announce a stage."""
        self.finish()
        self._name, self._total, self._done = name, total or 0, 0
        self._start = self._last = time.monotonic()
        _say(name)

    def advance(self, steps: int = 1, message: str = "") -> None:
        """Count, and print now and then; a remark of its own is printed at once."""
        if steps == 0:
            if self._verbose or is_warning(message):
                _say(message if is_warning(message) else f"  {message}")
            return
        self._done += steps
        now = time.monotonic()
        if now - self._last >= _QUIET_TIME and self._total:
            self._last = now
            left = (now - self._start) * max(0, self._total - self._done) / max(1, self._done)
            parts = [f"{self._name} {min(100, 100 * self._done // self._total)} %", message, f"about {left:.0f} s left"]
            _say("  " + ", ".join(part for part in (*parts, memory_text()) if part))

    def finish(self) -> None:
        """With detail: how long the stage took, and the memory at its end."""
        if self._name and self._verbose:
            _say(f"  {self._name}: {time.monotonic() - self._start:.1f} s, {memory_text()}")
        self._name = ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether standard error is a terminal that can move its cursor (what colour settings ask for does not matter)."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


@contextmanager
def reporter(quiet: bool, verbose: bool = False) -> Iterator[ProgressProtocol]:
    """The progress display that fits where output goes.

    Args:
        quiet: nothing at all.
        verbose: also versions, times of finished stages, and remarks such as the losses of a block.
    """
    if quiet:
        yield Silent()
        return
    if verbose:
        _say(version_line())
    if not on_terminal():
        lines = LineProgress(verbose)
        yield lines
        lines.finish()
        return
    with Progress(*_columns(), console=Console(stderr=True)) as bars:
        progress = BarProgress(bars, verbose)
        yield progress
        progress.finish()


def _columns() -> tuple[ProgressColumn, ...]:
    remark = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TimeLeftColumn(),
        MemoryColumn(),
        TextColumn("{task.fields[message]}", table_column=remark),
    )
