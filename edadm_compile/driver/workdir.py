"""The working folder of a compilation: checkpoints that a later run of the same command starts from.

::

    unet.qmod.work/
        lock                            held while a process works here
        run.json                        fingerprint: what all of it belongs to
        stages/calibration.safetensors  one file for each stage ...
        stages/reconstruct.joint.000.safetensors    ... and for each reconstructed block
        spill/                          caches beyond --memory (files without names)

Every file is written whole or not at all. ``docs/reliability.md`` describes what is kept and when it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edadm_compile.driver.checkpoint_file import DamagedCheckpoint, decode, encode
from edadm_compile.driver.fingerprint import differences, identity, program_of
from edadm_compile.driver.folder_lock import take_lock
from edadm_compile.errors import ResourceError, ResumeError
from edadm_compile.ir.program import Program
from edadm_compile.passes.checkpoint import Saved, machine
from edadm_compile.runtime.atomic import replace_file, sync_folder

FORMAT = "edadm_compile.workdir/1"
#: Stages in the words of messages; the other names are those of `CompileResult.seconds`.
_WORDS = {
    "calibration": "calibration samples", "assign_widths": "widths", "float_outputs": "output types",
    "calibrate": "ranges", "mean_correction": "mean correction", "quality": "quality",
}  # fmt: skip
_SHOWN = 8


class Workdir:
    """A `edadm_compile.passes.checkpoint.Checkpoints` in a folder, for one process at a time.

    Args:
        folder: made if it does not exist; an existing one must be empty or a working folder.
        say: receives sentences for the user: what is resumed, what was damaged.

    Raises:
        ResourceError: the folder cannot be used.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self._say = folder, say
        self._stages = folder / "stages"
        self._run, self._inputs, self._old = "", dict[str, Any](), dict[str, Any]()
        self._restored: dict[str, float] = {}
        self._kept: list[str] = []
        self._made = not folder.exists()
        _refuse_strange(folder)  # before the lock lies in somebody else's folder
        try:
            folder.mkdir(exist_ok=True)
            self._lock = take_lock(folder / "lock")
        except OSError as error:
            raise ResourceError(
                f"cannot work in {folder}: {error.strerror or error}; name a writable folder with --workdir"
            ) from None

    @property
    def spill(self) -> Path:
        """Where caches that exceed ``--memory`` go."""
        return self.folder / "spill"

    @property
    def restored(self) -> Mapping[str, float]:
        """Seconds that the stages loaded in this run took in an earlier one, by name."""
        return self._restored

    def claim(self, inputs: dict[str, Any], *, restart: bool) -> None:
        """Say what the compilation depends on, before anything is loaded.

        Args:
            inputs: see `edadm_compile.driver.fingerprint.inputs_of`.
            restart: discard what is there.

        Raises:
            ResumeError: the folder holds results for other inputs; the message says which differ.
        """
        self._inputs = inputs
        for folder in (self.folder, self._stages):
            for temporary in folder.glob(".*.tmp"):  # of a killed process: the lock is ours
                temporary.unlink(missing_ok=True)
        self._old = {} if restart else _read(self.folder, self._say)
        if not self._old:
            self._discard()
            return
        _compare(self.folder, {k: v for k, v in self._old["inputs"].items() if k != "program"}, inputs)

    def begin(self, program: Program) -> None:
        """Check that what is kept belongs to the captured program, and say what will be taken from it."""
        self._inputs = {**self._inputs, "program": program_of(program)}
        if self._old:
            _compare(self.folder, self._old["inputs"], self._inputs)
            self._tell()
        else:
            body = {"format": FORMAT, "inputs": self._inputs, "machine": machine()}
            with self._writing("run.json"):
                self._stages.mkdir(exist_ok=True)
                replace_file(self.folder / "run.json", _checked(body))
                sync_folder(self.folder)
        self._run = identity(self._inputs)

    def load(self, name: str) -> Saved | None:
        """The result of a stage, or None where it is missing or damaged."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            saved = decode(path, self._run)
        except DamagedCheckpoint as error:
            self.reject(name, str(error))
            return None
        self._restored[name] = saved.seconds
        if name not in self._kept:
            self._kept.append(name)
        return saved

    def save(self, name: str, saved: Saved) -> None:
        """Keep the result of a stage.

        Raises:
            ResourceError: it cannot be written; what was kept before is whole.
        """
        with self._writing(name):
            replace_file(self._path(name), encode(saved, self._run))
        self._kept.append(name)

    def reject(self, name: str, reason: str) -> None:
        """Drop a damaged result, aloud."""
        self._restored.pop(name, None)
        self._kept = [kept for kept in self._kept if kept != name]
        self._say(f"checkpoint {self._path(name)} is damaged and is made again ({reason})")
        self._path(name).unlink(missing_ok=True)

    def kept(self) -> str:
        """What a later run can start from, in words; empty when nothing."""
        return _in_words(self._kept)

    def remove(self) -> None:
        """Remove everything that belongs to the working folder, and the folder where nothing else is in it."""
        self._discard()
        (self.folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Let others use the folder; one that was made in vain is removed."""
        if self._made and not self._kept and self.folder.exists():
            self.remove()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _tell(self) -> None:
        done = _in_words(_stage_names(self.folder)) or "nothing yet"
        self._say(f"resuming from {self.folder}: {done} from an earlier run")
        others = differences(self._old.get("machine", {}), machine())
        if others:
            self._say(
                f"the earlier run was made elsewhere ({'; '.join(others)}): the file is valid, but its last bits may "
                "differ from those of one run"
            )

    def _discard(self) -> None:
        (self.folder / "run.json").unlink(missing_ok=True)  # first: without it no stage is believed
        for folder in (self._stages, self.spill):
            for path in folder.glob("*.safetensors"):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _path(self, name: str) -> Path:
        return self._stages / f"{name}.safetensors"

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"cannot keep {name} in {self.folder}: {error.strerror or error}; free space there or name another folder "
                "with --workdir, then run the same command again: what was kept before is whole"
            ) from None


def earlier_stages(folder: Path, inputs: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Stages and blocks that a compilation with these inputs would start from; the folder is only looked at.

    Args:
        inputs: see `edadm_compile.driver.fingerprint.inputs_of`; what is known after capture is not compared.

    Raises:
        ResumeError: the folder holds results for other inputs.
        ResourceError: it cannot be read, or is somebody else's.
    """
    _refuse_strange(folder)
    old = _read(folder, say)
    if not old:
        return []
    _compare(folder, {k: v for k, v in old["inputs"].items() if k != "program"}, inputs)
    return _stage_names(folder)


def _refuse_strange(folder: Path) -> None:
    strange = sorted(p.name for p in folder.iterdir() if not _is_ours(p.name)) if folder.is_dir() else []
    if strange and not (folder / "run.json").exists():
        raise ResourceError(
            f"{folder} is neither empty nor a working folder (it holds {strange[0]}); name another with --workdir"
        )


def _stage_names(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix(".safetensors") for p in (folder / "stages").glob("*.safetensors"))


def _compare(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = differences(old, new)
    if not changed:
        return
    more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
    raise ResumeError(
        f"{folder} holds an earlier compilation with other inputs: {'; '.join(changed[:_SHOWN])}{more}. Give the "
        "earlier inputs to resume it, --restart (restart=True) to discard it and begin again, or another --workdir "
        "to keep both"
    )


def _read(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """``run.json``, or nothing where it is missing or damaged."""
    try:
        text = (folder / "run.json").read_text()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"cannot read {folder / 'run.json'}: {error}") from None
    try:
        record = json.loads(text)
        if record["sha256"] == _sha(record["body"]) and record["body"]["format"] == FORMAT:
            body: dict[str, Any] = record["body"]
            return body
    except (ValueError, LookupError, TypeError):
        pass
    say(f"{folder / 'run.json'} is damaged or of another version: everything is made again")
    return {}


def _in_words(names: list[str]) -> str:
    blocks = sum("." in name for name in names)
    words = [word for name, word in _WORDS.items() if name in names]
    if blocks:
        words.insert(sum(name in names for name in list(_WORDS)[:4]), f"{blocks} block{'s' * (blocks > 1)}")
    return " and ".join(", ".join(words).rsplit(", ", 1))


def _is_ours(name: str) -> bool:
    return name in ("lock", "run.json", "stages", "spill") or (name.startswith(".") and name.endswith(".tmp"))


def _checked(body: dict[str, Any]) -> bytes:
    return (json.dumps({"sha256": _sha(body), "body": body}, indent=1) + "\n").encode()


def _sha(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
