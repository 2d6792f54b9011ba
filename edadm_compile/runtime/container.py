"""The container of a ``.qmod`` file, checked before anything is allocated for it: a safetensors header and its bytes.

The safetensors library checks its format too; what it accepts and this does not: duplicate names, more tensors or a
larger header than a model has, types that no program uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm_compile.errors import ArtifactError
from edadm_compile.runtime import json_text
from edadm_compile.runtime.limits import Limits

#: Bytes of an element by the container's name of its type.
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        metadata: its texts by name.
        tensors: names of its tensors.
    """

    metadata: dict[str, str]
    tensors: tuple[str, ...]


def read_header(path: Path, limits: Limits) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        ArtifactError: unreadable, no such file, beyond `limits`, or tensors that overlap, leave holes or the file.
    """
    try:
        size = path.stat().st_size
        if not path.is_dir() and not path.is_file():  # a pipe would be waited for
            raise OSError(22, "not a regular file")
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, limits.header):
                raise ArtifactError(
                    f"{path} is not a .qmod file, or is truncated: header of {length} bytes in a file of {size}"
                )
            raw = stream.read(length)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    if size > limits.file:
        raise ArtifactError(f"{path}: {size} bytes, allowed {limits.file}")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"{path} is not a .qmod file, or is damaged: its header is not text") from None
    value = json_text.parse(text, f"{path}: header", limits)
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a .qmod file: its header is no table")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise ArtifactError(f"{path}: the header's metadata are no texts")
    _check_tensors(value, size - 8 - length, path, limits)
    return Header(metadata, tuple(sorted(value)))


def _check_tensors(records: dict[str, Any], room: int, path: Path, limits: Limits) -> None:
    """Every tensor where the one before it ends, the first at the start, the last at the end of the file."""
    if len(records) > limits.tensors:
        raise ArtifactError(f"{path}: {len(records)} tensors, allowed {limits.tensors}")
    pieces = []
    for name, record in records.items():
        if len(name) > limits.string:
            raise ArtifactError(f"{path}: a tensor's name has {len(name)} characters, allowed {limits.string}")
        pieces.append((*_extent(record, f"{path}: tensor {name[:80]!r}"), name))
    end = 0
    for start, stop, name in sorted(pieces):
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise ArtifactError(f"{path}: tensor {name[:80]!r} {what}: it starts at byte {start}, expected {end}")
        end = stop
    if end != room:
        raise ArtifactError(f"{path} is truncated, or has bytes that belong to no tensor: {room} bytes for {end}")


def _extent(record: Any, place: str) -> tuple[int, int]:
    """First and last + 1 byte of a tensor."""
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{place}: expected a type, a shape and offsets")
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ArtifactError(f"{place}: type {str(dtype)[:20]!r}, allowed {', '.join(_SIZES)}")
    if not _counts(shape) or len(shape) > 8:
        raise ArtifactError(f"{place}: shape {str(shape)[:80]} is not understood")
    if not _counts(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{place}: offsets {str(offsets)[:80]} are not understood")
    start, stop = offsets
    if stop - start != math.prod(shape) * _SIZES[dtype]:
        raise ArtifactError(f"{place}: {stop - start} bytes for {dtype} {shape}")
    return start, stop


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)
