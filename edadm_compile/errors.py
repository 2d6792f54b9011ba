"""Every exception the package raises on purpose.

::

    EdadmError                what the command line prints as one sentence; each class has its exit code
    ├── InputError            a model file, folder, factory or option that cannot be used
    │   └── ConfigError       a quantization setting out of its range, or a bad TOML/JSON file
    ├── CaptureError          torch.export could not capture the model, or a layer escaped the graph
    ├── DialectError          a pass produced a graph that its dialect does not allow (a bug in a pass)
    ├── CalibrationError      calibration data that cannot be used (not finite, wrong shape)
    ├── ArtifactError         a .qmod file that is truncated, altered, foreign or of an unknown version
    ├── ContractError         integer execution and simulated quantization disagree (``verify`` failed)
    ├── QualityError          measured quality is beyond a limit that was asked for (``evaluate`` failed)
    ├── TargetError           a GPU without code in the file, or a missing tool to make or run it
    ├── ExportError           a program, or a request, that has no ONNX form
    └── ParallelError         processes of one run that do not find each other, or lost one
    └── ResourceError         out of memory, no space for checkpoints or caches, or a working folder in use
        └── ResumeError       a working folder that belongs to another compilation
    Stopped                   SIGINT or SIGTERM, with what was kept (a KeyboardInterrupt, no EdadmError)

Messages say what happened, where, what was found, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """End of a message: "; did you mean 'x'?" where a known name is close to what was given, else nothing."""
    close = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class EdadmError(Exception):
    """Base of all errors below; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class InputError(EdadmError):
    """A model, file or option given by the user cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown or outside its allowed range."""


class CaptureError(EdadmError):
    """The model could not be captured as a graph."""

    exit_code = 3


class DialectError(EdadmError):
    """A graph breaks the rules of its dialect: always a bug in the pass that made it."""

    exit_code = 4


class CalibrationError(EdadmError):
    """Calibration samples or activations are unusable."""

    exit_code = 5


class ArtifactError(EdadmError):
    """A ``.qmod`` file cannot be trusted or understood."""

    exit_code = 6


class ContractError(EdadmError):
    """Integer execution does not match the simulated quantization it was compiled from."""

    exit_code = 7


class QualityError(EdadmError):
    """Measured quality is beyond a limit that the user set; the same exit code as other failed checks."""

    exit_code = 7


class TargetError(EdadmError):
    """There is no code for a device, or the tool that would make or run it is missing or failed."""

    exit_code = 8


class ExportError(EdadmError):
    """A program cannot be written as the ONNX graph that was asked for."""

    exit_code = 9


class ParallelError(EdadmError):
    """The processes of a run under ``torchrun`` cannot go on together."""

    exit_code = 11


class ResourceError(EdadmError):
    """The machine ran out of memory or disk space, or a working folder cannot be used."""

    exit_code = 10


class ResumeError(ResourceError):
    """A working folder holds another compilation than the one that was asked for."""


class Stopped(KeyboardInterrupt):
    """The process was asked to stop; ``exit_code`` is 128 and the signal's number, as shells have it."""

    def __init__(self, message: str = "", signum: int = 2) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum
