"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from edadm_compile.errors import ResourceError


def take_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock; None where the file system has no locks.

    Raises:
        ResourceError: another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # removed by the process that held it: take the lock of a new file
        except BlockingIOError:
            os.close(descriptor)
            raise ResourceError(
                f"another process is compiling in {path.parent}; wait for it, or name another folder with --workdir"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)
