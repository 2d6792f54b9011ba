"""Failures as one sentence and an exit code: the package's own errors, wrong options, and bugs."""

from __future__ import annotations

import errno
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from edadm_compile.errors import EdadmError

#: Exit code of an exception nobody planned for (``EX_SOFTWARE`` of sysexits.h).
INTERNAL = 70
#: Of Ctrl-C: 128 + SIGINT, as shells count.
INTERRUPTED = 130
#: Beginnings of what torch says when the processor's or the GPU's memory is full.
_FULL = ("[enforce fail at alloc_cpu", "DefaultCPUAllocator", "CUDA out of memory")


def describe(error: BaseException) -> tuple[str, int]:
    """What to print for an exception that ended a verb, and the exit code."""
    if isinstance(error, EdadmError):
        return f"error: {error}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        # What was stopped may know what it kept (`edadm_compile.errors.Stopped`).
        return str(error) or "interrupted: nothing was written", getattr(error, "exit_code", INTERRUPTED)
    if isinstance(error, MemoryError) or any(mark in str(error) for mark in _FULL):
        return "error: out of memory; give the machine more, or ask for less: smaller --batch or --calib-samples", 1
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename is not None else ""
        return f"error: cannot use{where}: {error.strerror}", 2
    text = " ".join(str(error).split())[:300]
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"internal error: {found}; this is a bug: run again with --debug and please report what it prints", INTERNAL


def end(error: BaseException, debug: bool) -> None:
    """Print an exception as one sentence, with its traceback in front when asked for, and exit.

    Raises:
        SystemExit: always; exceptions that click or the shell handle go on as they are.
    """
    broken_pipe = isinstance(error, OSError) and error.errno == errno.EPIPE
    if broken_pipe or isinstance(error, (click.ClickException, click.exceptions.Exit, click.Abort)):
        raise error
    if debug:
        traceback.print_exception(error)
    sentence, code = describe(error)
    click.echo(sentence, err=True)
    sys.exit(code)


class WrongUsage(click.UsageError):
    """A command line that cannot be understood, as one sentence."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it the way all errors are printed."""
        click.echo(f"error: {self.format_message()}", err=True, file=file)


@contextmanager
def usage_as_sentence() -> Iterator[None]:
    """Turn click's usage errors into `WrongUsage`."""
    try:
        yield
    except (WrongUsage, click.exceptions.NoArgsIsHelpError):
        raise
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "edadm-compile"
        raise WrongUsage(f"{_usage(error)} (see {path} --help)", error.ctx) from None


def _usage(error: click.UsageError) -> str:
    """What was got and what is allowed."""
    if isinstance(error, click.NoSuchOption):
        near = f"; did you mean {' or '.join(error.possibilities)}?" if error.possibilities else ""
        return f"unknown option {error.option_name}{near}"
    if isinstance(error, click.MissingParameter):
        return f"{_name(error)} is missing"
    message = error.message.rstrip(".")
    if not isinstance(error, click.BadParameter):
        return message[:1].lower() + message[1:]
    for pattern, sentence in _REWORDED:
        if found := pattern.fullmatch(message):
            return f"{_name(error)}: {found.expand(sentence)}"
    return f"{_name(error)}: {message}"


#: What click says of numbers, in the words of this package.
_REWORDED = (
    (re.compile(r"(\S+) is not in the range (\S+)<=x<=(\S+)"), r"got \1, allowed \2 to \3"),
    (re.compile(r"(\S+) is not in the range x>=(\S+)"), r"got \1, allowed \2 or more"),
    (re.compile(r"(.+) is not a valid integer( range)?"), r"got \1, expected a whole number"),
    (re.compile(r"(.+) is not a valid float( range)?"), r"got \1, expected a number"),
)


def _name(error: click.BadParameter) -> str:
    if error.param is None:
        return str(error.param_hint or "option")
    if isinstance(error.param, click.Argument):
        return str(error.param.name).upper()
    return max(error.param.opts, key=len)


def calm_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: IO[str] | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` for a terminal: the package's own warnings as a sentence, others as Python prints them."""
    if issubclass(category, RuntimeWarning):
        click.echo(f"warning: {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)
