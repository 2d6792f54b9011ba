"""Equal compilations of the example are made once for all pages: same file, same options, same bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

#: Options with which a result depends on more than the model file and the command line, or prints more than a summary.
_OTHER_FILES = {"--config", "--cond", "--uncond", "--factory", "--scheduler", "--dump-graphs", "--json",
                "--prompts", "--pipeline", "--original-config"}  # fmt: skip


def compiled(arguments: list[str], run: Callable[[], None]) -> None:
    """Run ``edadm-compile`` with `arguments`, or copy the file that an equal command has made.

    Args:
        arguments: of a compilation, with ``-o``; any other command is just run.
        run: executes it; leaves with SystemExit.
    """
    plan = _plan(arguments)
    if plan is None:
        run()
        return
    kept, output = plan
    if kept.exists():
        shutil.copyfile(kept, output)
        print(f"{output}: as compiled for an earlier page")
        return
    try:
        run()
    except SystemExit as done:
        if done.code:
            raise
    kept.parent.mkdir(parents=True, exist_ok=True)
    draft = kept.with_suffix(f".{os.getpid()}")
    shutil.copyfile(output, draft)
    draft.replace(kept)  # pages run beside each other


def _plan(arguments: list[str]) -> tuple[Path, Path] | None:
    """(place of the kept file, output) of a compilation of one plain file, else None."""
    words = arguments[1:] if arguments[:1] == ["compile"] else list(arguments)
    if (
        "-o" not in words
        or _OTHER_FILES & {*words}
        or not words[0].endswith("model.pt")
        or not Path(words[0]).is_file()
    ):
        return None
    position = words.index("-o")
    output = Path(words[position + 1])
    del words[position : position + 2]
    key = hashlib.sha256(Path(words[0]).read_bytes() + "\0".join(words[1:]).encode()).hexdigest()
    return Path(os.environ["XDG_CACHE_HOME"]) / "pages" / f"{key}.qmod", output
