"""A ``.qmod`` file taken apart, and put together again with correct checksums around whatever was changed."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

_TORCH = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8",
          "I16": "int16", "I32": "int32", "I64": "int64", "BOOL": "bool"}  # fmt: skip


@dataclass
class Stored:
    """One tensor: the container's name of its type, its shape, its bytes."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Parts:
    """What a file consists of; `plans` and `cubins` are inflated, by the names of their tensors.

    `changed` names those of them that are not as their tensors are.
    """

    manifest: dict[str, Any]
    tensors: dict[str, Stored]
    plans: dict[str, Any]
    cubins: dict[str, bytes]
    changed: set[str] = field(default_factory=set)

    def frozen(self) -> bytes:
        """For `thawed`: many copies to be changed."""
        return pickle.dumps(self)


def thawed(frozen: bytes) -> Parts:
    """A copy of what `Parts.frozen` was called on."""
    found: Parts = pickle.loads(frozen)
    return found


def take_apart(data: bytes) -> Parts:
    """The parts of a good file."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header.pop("__metadata__")["edadm"].partition("\n")[2])
    body = data[8 + length :]
    tensors = {n: Stored(r["dtype"], r["shape"], body[slice(*r["data_offsets"])]) for n, r in header.items()}
    plans = {n: json.loads(zlib.decompress(t.data)) for n, t in tensors.items() if n.startswith("device.plans.")}
    cubins = {n: zlib.decompress(t.data) for n, t in tensors.items() if n.startswith("device.cubins.")}
    return Parts(manifest, tensors, plans, cubins)


def header_of(parts: Parts, sign: bool = True) -> tuple[dict[str, Any], bytes]:
    """The container's header and body.

    Args:
        sign: compute the checksums of tensors, kernels and manifest anew.
    """
    for name in parts.changed:
        image = json.dumps(parts.plans[name]).encode("utf-8", "replace") if name in parts.plans else parts.cubins[name]
        if name in parts.tensors:
            data = zlib.compress(image, 1)
            parts.tensors[name] = Stored("U8", [len(data)], data)
    if sign:
        _sign(parts)
    text = json.dumps(parts.manifest)
    digest = hashlib.sha256(text.encode()).hexdigest()
    header: dict[str, Any] = {"__metadata__": {"edadm": f"{digest}\n{text}"}}
    at, body = 0, []
    for name, tensor in parts.tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + len(tensor.data)]}
        at += len(tensor.data)
        body.append(tensor.data)
    return header, b"".join(body)


def put_together(header: Any, body: bytes) -> bytes:
    """The bytes of a file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "replace")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _sign(parts: Parts) -> None:
    manifest = parts.manifest
    device = manifest.get("device") if isinstance(manifest, dict) else None
    if isinstance(device, dict) and isinstance(device.get("cubins"), dict):
        for key, record in device["cubins"].items():
            image = parts.cubins.get(f"device.cubins.{key}")
            if isinstance(record, dict) and image is not None and "sha256" in record:
                record["sha256"] = hashlib.sha256(image).hexdigest()
    if isinstance(manifest, dict) and isinstance(manifest.get("tensors"), dict):
        sha = hashlib.sha256()
        for name, tensor in sorted(parts.tensors.items()):
            shape = [int(n) for n in tensor.shape] if isinstance(tensor.shape, list) else tensor.shape
            sha.update(f"{name} {_TORCH.get(tensor.dtype)} {shape}\n".encode("utf-8", "replace") + tensor.data)
        manifest["tensors"]["sha256"] = sha.hexdigest()
