"""Failures of a program that passed every check of its file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edadm_compile.errors import ArtifactError, EdadmError


@contextmanager
def running(what: str) -> Iterator[None]:
    """Turn whatever a program from a file raises into a sentence; running out of memory stays what it is.

    Shapes are checked on load, values are not: an index among the weights can lie outside of a table.

    Args:
        what: begins the sentence, such as "the program cannot run".

    Raises:
        ArtifactError: anything but an error of this package, or one of memory.
    """
    try:
        yield
    except (EdadmError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ArtifactError(
            f"{what} ({type(error).__name__}: {reason}); a label outside of the model's classes, or a file that was "
            "altered or made by another version"
        ) from error
