"""A process of two fails, or is killed, while the other waits for it; run by `test_processes`."""

import os
import signal
import sys

import torch

from edadm_compile.cli.options import guarded
from edadm_compile.errors import CalibrationError
from edadm_compile.parallel.launch import processes


@guarded
def main(how):
    """Meet once, then lose the second process."""
    with processes() as world:
        world.add([torch.ones(3)])
        if world.leads:
            world.add([torch.ones(3)])
            raise AssertionError("the second process did not come to this meeting")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise CalibrationError("only the second process has this error")


if __name__ == "__main__":
    main(sys.argv[1])
