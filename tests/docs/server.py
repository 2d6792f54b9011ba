"""A process that has imported everything once and runs each command of a page in a fork of itself.

Starting Python with torch takes seconds, and the pages have a hundred commands. Every command still gets a process, a
working folder, an environment and standard streams of its own. Started as ``python -m tests.docs.server SOCKET``; the clients are
the executables that `shims.write` makes.
"""

from __future__ import annotations

import array
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
import warnings

from tests.docs import reuse
from tests.docs.shims import reduced


def preload() -> None:
    """Import what a command needs, and compile a tiny network: the first trace fills caches that the forks then share."""
    import diffusers  # noqa: F401
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
    import onnxruntime  # noqa: F401

    import edadm_compile.cli
    import edadm_compile.driver.compile
    import edadm_compile.driver.evaluate
    import edadm_compile.driver.export
    import edadm_compile.driver.sample
    import edadm_compile.driver.verify
    import edadm_compile.runtime.session
    from edadm_compile.config import ReconstructionConfig
    from tests.graphs import TinyUNet, small_config, source_of

    quick = small_config(reconstruction=ReconstructionConfig(iters=1, batch=4))
    edadm_compile.pipeline.compile_source(source_of(TinyUNet(), steps=2), quick)
    gc.freeze()  # collections in the forks leave these pages shared


def serve(path: str) -> None:
    """Answer commands, several at a time, as long as the process that started this one lives."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the handlers
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    owner = os.getppid()
    while os.getppid() == owner:
        if not select.select([listener], [], [], 2)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _handle(connection)
            os._exit(0)
        connection.close()


def _handle(connection: socket.socket) -> None:
    """Run one command and tell its client the exit status."""
    request, streams = _receive(connection)
    child = os.fork()
    if child == 0:
        connection.close()
        os._exit(_run(request, streams))
    for stream in streams:
        os.close(stream)
    status = _wait(child, connection)
    if status is not None:
        connection.sendall(str(status).encode())


def _wait(child: int, connection: socket.socket) -> int | None:
    """Exit status of the command; None when its client was killed, and then the command is too."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if select.select([connection], [], [], 0.02)[0] and not connection.recv(1):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None


def _receive(connection: socket.socket) -> tuple[dict, list[int]]:
    size = array.array("i").itemsize * 3
    data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_LEN(size))
    streams = array.array("i")
    for _, _, content in ancillary:
        streams.frombytes(content[:size])
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 20)
    return json.loads(data), list(streams)


def _run(request: dict, streams: list[int]) -> int:
    """One command in this (forked) process; its exit status."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    warnings.resetwarnings()
    try:
        _execute(request["program"], request["arguments"])
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _execute(program: str, arguments: list[str]) -> None:
    sys.argv = [program, *arguments]
    if program == "edadm-compile":
        from edadm_compile.cli import main

        sys.path.pop(0)  # the working folder of the server; a console script has its own folder there
        sys.argv[1:] = reduced(arguments, list(main.commands))
        reuse.compiled(sys.argv[1:], lambda: main(prog_name="edadm-compile"))
    elif arguments[:1] == ["-m"]:
        sys.path[0], sys.argv = os.getcwd(), arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[:1] == ["-c"]:
        sys.path[0], sys.argv = os.getcwd(), ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(arguments[0])), arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    preload()
    serve(sys.argv[1])
