"""The executables that a page's commands find first on PATH, and the settings they are reduced to."""

from __future__ import annotations

import sys
from pathlib import Path

#: Options of each verb that make it quick; they replace what a page gives. Everything else is run as it stands.
REDUCED: dict[str, dict[str, str]] = {
    "compile": {"--iters": "1", "--calib-samples": "8", "--targets": "none"},
    "evaluate": {"-n": "4"},
    "verify": {"-n": "1"},
    "sample": {"-n": "2"},
    "bench": {"--repeats": "2"},
}
#: Limits of quality: a network with random weights and one step of reconstruction does not reach them.
_DROPPED = ("--fail-below", "--fail-above")

_CLIENT = """#!{python} -SEs
import array, json, os, socket, sys
request = {{"program": "{program}", "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
client = socket.socket(socket.AF_UNIX)
client.connect("{address}")
streams = array.array("i", [0, 1, 2])
client.sendmsg([b" "], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
client.sendall(json.dumps(request).encode() + b"\\n")
status = int(client.recv(16))
sys.exit(status if status >= 0 else 128 - status)
"""


def write(folder: Path, address: Path) -> None:
    """Make ``edadm-compile``, ``python`` and ``pip`` in `folder`.

    ``python -m pytest`` starts an interpreter of its own, since it has to import what a page has changed. ``pip`` fails:
    a page that installs something has to say that it is not run.
    """
    folder.mkdir()
    for program in ("edadm-compile", "python"):
        client = folder / f".{program}-client"
        client.write_text(_CLIENT.format(python=sys.executable, program=program, address=address))
        client.chmod(0o755)
    _script(folder / "edadm-compile", f'exec "{folder}/.edadm-compile-client" "$@"')
    fresh = f'if [ "$1 $2" = "-m pytest" ]; then exec "{sys.executable}" "$@"; fi'
    _script(folder / "python", f'{fresh}\nexec "{folder}/.python-client" "$@"')
    _script(folder / "pip", "echo 'pip: mark this block as not run' >&2; exit 1")


def _script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def reduced(arguments: list[str], verbs: list[str]) -> list[str]:
    """Arguments of ``edadm-compile`` with the settings of `REDUCED`."""
    verb = arguments[0] if arguments and arguments[0] in verbs else "compile"
    if not arguments or "--help" in arguments or "--version" in arguments:
        return arguments
    wanted = dict(REDUCED.get(verb, {}))
    if "--deploy" in arguments:
        wanted.pop("--targets", None)  # such a file has no GPU code, and the option is refused
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in wanted or argument in _DROPPED:
            next(rest)
        else:
            kept.append(argument)
    return kept + [part for item in wanted.items() for part in item]
