"""Refuse ``torch.export`` archives that could run code when they are opened or called.

An archive is plain JSON and raw tensors for most models, but the format also allows pickled tensors and objects,
compiled libraries, calls of any Python function in torch, shape expressions that sympy evaluates as Python, and names
that torch writes into generated code. All these are refused. Guards, which are Python code too, must not be run by the
caller: ``program.module(check_guards=False)``.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from edadm_compile.errors import InputError
from edadm_compile.frontend.torch_file_check import check_torch_bytes
from edadm_compile.frontend.zip_check import check_zip

_LARGEST_JSON = 256 * 2**20
#: Below the archive's root folder.
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
)
_TARGETS = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)"
)
#: Names of values and arguments.
_NAME = re.compile(r"[\w.]*")
#: How torch.export writes a size that is not fixed.
_SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=True)*\)")
#: Names, numbers, operators, and calls of sympy's capitalised functions (Max, FloorDiv); no attribute, no string.
_EXPRESSION = re.compile(r"(?!.*__)(?!.*\b[a-z_]\w*\s*\()(?!.*\)\s*\()[\w\s+\-*/%(),<>=]*")


def check_archive(path: Path) -> None:
    """Look through an archive without opening it with torch.

    Raises:
        InputError: an entry, an operator or an expression that a network of ATen operators does not need, or an
            archive that would unpack to far more than it is (`check_zip`).
    """
    entries = check_zip(path)
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.partition("/")[2]: info for info in entries}
        if len(names) != len(entries):  # two folders
            raise InputError(f"{path} holds two entries of one name; {_ADVICE}")
        if any(name.endswith("serialized_exported_program.json") for name in names):
            raise InputError(f"{path} was written by an older torch; {_ADVICE} of torch {torch.__version__}")
        for name in names:
            if not _ENTRIES.fullmatch(name):
                raise InputError(f"{path}: entry {name!r} could run code when opened; {_ADVICE}")
        for name, info in names.items():
            if name.endswith(".json"):
                if info.file_size > _LARGEST_JSON:
                    raise InputError(f"{path}: entry {name!r} has {info.file_size} bytes, allowed {_LARGEST_JSON}")
                _check_json(path, _json(path, archive.read(info)))
            elif name.endswith(".pt"):
                _check_inputs(path, archive, info)


def _json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise InputError(f"{path}: JSON that is nested too deeply; {_ADVICE}") from None


def open_archive(path: Path, trusted: bool = False) -> ExportedProgram:
    """Open an archive; torch prints no traceback of what it cannot read.

    Args:
        trusted: do not look through it first.

    Raises:
        InputError: as `check_archive`.
        Exception: whatever torch raises of an archive it cannot read.
    """
    if not trusted:
        check_archive(path)
    log = logging.getLogger("torch.export")
    log.addFilter(_nothing)
    try:
        return torch.export.load(path)
    finally:
        log.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


_ADVICE = "export a network of torch operators on plain tensors with torch.export.save"


def _check_json(path: Path, value: Any) -> None:
    for key, item in _entries(value):
        if key == "use_pickle" and item is not False:
            raise InputError(f"{path} holds a pickled tensor, which can run any code when opened; {_ADVICE}")
        if key == "target" and isinstance(item, str) and not _TARGETS.fullmatch(item):
            raise InputError(f"{path} calls {item!r}; allowed are ATen operators: {_ADVICE}")
        if key in ("name", "forward_arg_names"):
            for name in item if isinstance(item, list) else [item]:
                if isinstance(name, str) and not _NAME.fullmatch(name):
                    raise InputError(f"{path}: {name[:80]!r} is no name; {_ADVICE}")
        if key == "expr_str" and isinstance(item, str) and not _EXPRESSION.fullmatch(_SYMBOL.sub("s", item)):
            raise InputError(f"{path}: shape expression {item[:80]!r} is more than arithmetic; {_ADVICE}")


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and item of nested JSON."""
    stack = [value]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            yield from found.items()
            stack.extend(found.values())
        elif isinstance(found, list):
            stack.extend(found)


def _check_inputs(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Example inputs are a torch file; torch.export opens it as a pickle when the safe way fails, so it must not fail."""
    if info.file_size == 0:
        return
    data = archive.read(info)
    check_torch_bytes(path, data)
    with io.BytesIO(data) as stream:
        try:
            torch.load(stream, map_location="cpu", weights_only=True)
        except Exception:
            raise InputError(f"{path}: example inputs are pickled objects other than tensors; {_ADVICE}") from None
