"""The ``.qmod`` file: one safetensors file, tensors beside a JSON manifest (docs/qmod_format.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from edadm_compile.errors import ArtifactError, EdadmError
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.program import (
    InputSpec,
    Program,
    Signature,
    TimeTables,
    get_constant,
    layers,
    placeholders,
)
from edadm_compile.ir.valueless import has_values
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.runtime import device_code
from edadm_compile.runtime.program_json import graph_from_json, graph_to_json, layers_from_json
from edadm_compile.runtime.sampler_json import sampler_from_json, sampler_to_json

FORMAT = "edadm.qmod/1"
_KEY = "edadm"
_PATH_DIALECT = "float"
#: A header larger than this is refused before it is parsed.
MAX_HEADER = 64 << 20


@dataclass(frozen=True)
class Artifact:
    """What a ``.qmod`` file holds.

    Attributes:
        qdq: engine-neutral program; the source that everything else can be rebuilt from.
        lowered: program of integer operators.
        manifest: configuration, provenance, quality and versions.
        device: launch plans and compiled kernels for GPUs; None where none were made.
    """

    qdq: Program
    lowered: Program
    manifest: dict[str, Any] = field(default_factory=dict)
    device: Bundle | None = None


def to_bytes(artifact: Artifact) -> bytes:
    """Serialise deterministically: the same artifact gives the same bytes."""
    tensors, manifest = contents(artifact)
    stored = {name: _shrink(value) for name, value in sorted(tensors.items())}
    widened = [name for name in stored if stored[name].dtype != tensors[name].dtype]
    manifest["tensors"] = {"sha256": digest(stored), "float32_stored_as_float16": widened}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    # One metadata entry only: safetensors writes several in no fixed order.
    checked = f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    data: bytes = save(stored, metadata={_KEY: checked})
    return data


def contents(artifact: Artifact) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds: tensors by name, and the manifest but for its record of these tensors."""
    tensors: dict[str, Tensor] = {}
    programs = {}
    records = layers(artifact.lowered)  # both programs share them: the lowered ones know what executes
    names = [info.name for info in records]
    for program in (artifact.qdq, artifact.lowered):
        _collect(program.graph_module, tensors)
        programs[program.dialect] = graph_to_json(program.graph_module.graph, names)
    time = artifact.lowered.time
    manifest = {
        **artifact.manifest,
        "format": FORMAT,
        "signature": _signature_json(artifact.lowered.signature),
        "sampler": sampler_to_json(artifact.lowered.sampler, artifact.lowered.signature, tensors),
        "notes": list(artifact.lowered.notes),
        "programs": programs,
        "layers": [dataclasses.asdict(info) for info in records],
        "time": None if time is None else _time_json(time, tensors),
        "device": None if artifact.device is None else device_code.store(artifact.device, tensors),
    }
    return tensors, manifest


def expected_size(artifact: Artifact) -> int:
    """Bytes of the file of an artifact, some of whose constants may have no values (`edadm_compile.ir.valueless`).

    A large float32 constant without values counts in full: whether float16 would do is not known.
    """
    tensors, manifest = contents(artifact)
    stored = {name: _shrink(value) if has_values(value) else value for name, value in sorted(tensors.items())}
    widened = [name for name in stored if stored[name].dtype != tensors[name].dtype]
    manifest["tensors"] = {"sha256": "0" * 64, "float32_stored_as_float16": widened}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    header: dict[str, Any] = {"__metadata__": {_KEY: f"{'0' * 64}\n{text}"}}
    offset = 0
    for name, value in stored.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def write(artifact: Artifact, path: Path) -> int:
    """Serialise and write atomically; returns the size in bytes.

    Raises:
        ArtifactError: the file cannot be written; an older file of that name is untouched.
    """
    data = to_bytes(artifact)
    write_atomically(path, data)
    return len(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary file beside it, fsync, rename.

    Raises:
        ArtifactError: the file cannot be written; an older file of that name is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Artifact:
    """Read and check a file.

    Raises:
        ArtifactError: missing, truncated, altered, foreign, or of another version.
    """
    manifest = read_manifest(path)
    tensors = _Tensors(path, manifest.get("tensors"))
    try:
        signature = _signature_from(manifest["signature"])
        sampler = sampler_from_json(manifest["sampler"], signature, tensors)
        time = _time_from(manifest["time"], tensors, signature)
        programs = []
        records = layers_from_json(manifest["layers"])
        for dialect in ("qdq", "lowered"):
            module = graph_from_json(manifest["programs"][dialect], tensors, dialect, records)
            program = Program(module, dialect, signature, sampler, time, tuple(manifest["notes"]))
            verify(program)
            programs.append(program)
        propagate_shapes(programs[1])
        device = device_code.restore(manifest.get("device"), tensors)
    except ArtifactError:
        raise
    except EdadmError as error:
        raise ArtifactError(f"{path}: inconsistent program: {error}") from error
    except Exception as error:  # the manifest passed its checksum: whoever wrote it did so wrongly
        raise ArtifactError(f"{path}: malformed manifest ({type(error).__name__}: {str(error)[:200]})") from error
    kept = {
        k: v
        for k, v in manifest.items()
        if k not in ("programs", "tensors", "layers", "signature", "time", "notes", "sampler", "device")
    }
    return Artifact(programs[0], programs[1], kept, device)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, checked against its digest.

    Raises:
        ArtifactError: as `read`.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None
    if size < 8 or header > min(size - 8, MAX_HEADER):
        raise ArtifactError(
            f"{path} is not a .qmod file, or is truncated: header of {header} bytes in a file of {size}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not a .qmod file, or is truncated or damaged: {error}") from None
    if _KEY not in metadata:
        raise ArtifactError(f"{path} is a safetensors file without an edadm manifest: not made by edadm-compile")
    sha, _, text = metadata[_KEY].partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != sha:
        raise ArtifactError(f"{path} is damaged: the manifest does not match its checksum")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: malformed manifest: {error}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path}: format {found!r}, this version reads {FORMAT!r}; recompile the model")
    return dict(manifest)


class _Tensors:
    """Constants of a file by name, checked together against the digest in the manifest."""

    def __init__(self, path: Path, record: Any) -> None:
        self._path = path
        names = record.get("float32_stored_as_float16") if isinstance(record, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ArtifactError(f"{path}: manifest has no tensor record")
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if digest(stored) != record.get("sha256"):
            raise ArtifactError(f"{path} is damaged: its tensors do not match their checksum")
        widened = set(names)
        self._cache: dict[str, Tensor] = {
            name: value.float() if name in widened else value for name, value in stored.items()
        }

    def __call__(self, name: str) -> Tensor:
        if name not in self._cache:
            raise ArtifactError(f"{self._path}: the program needs a tensor {name!r} that the file does not have")
        return self._cache[name]


def _shrink(value: Tensor) -> Tensor:
    """float32 stored as float16 where that loses nothing (weights of checkpoints trained or shipped in fp16)."""
    value = value.contiguous()
    if value.dtype == torch.float32 and value.numel() > 1 and bool((value.half().float() == value).all()):
        return value.half()
    return value


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order given."""
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(f"{name} {_dtype(value)} {list(value.shape)}\n".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _collect(module: torch.fx.GraphModule, tensors: dict[str, Tensor]) -> None:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensors[str(node.target)] = get_constant(module, str(node.target))


def _signature_json(signature: Signature) -> dict[str, Any]:
    inputs = [
        {**vars(s), "dtype": str(s.dtype).removeprefix("torch."), "shape": list(s.shape)} for s in signature.inputs
    ]
    return {**vars(signature), "inputs": inputs}


def _signature_from(value: dict[str, Any]) -> Signature:
    inputs = tuple(
        InputSpec(**{**v, "dtype": getattr(torch, v["dtype"]), "shape": tuple(int(s) for s in v["shape"])})
        for v in value["inputs"]
    )
    if any(
        min(s.shape, default=1) < 1 or math.prod(s.shape) > 1 << 28 or not isinstance(s.dtype, torch.dtype)
        for s in inputs
    ):
        raise ArtifactError("signature: absurd input size or type")
    if [s.role for s in inputs[:2]] != ["x", "t"] or not all(
        isinstance(s.name, str) and s.name.isidentifier() for s in inputs
    ):
        raise ArtifactError("signature: the inputs are not x, t and conditions")
    signature = Signature(**{**value, "inputs": inputs})
    batches = (signature.min_batch, signature.max_batch)
    if (
        any(type(b) is not int for b in batches)
        or not 1 <= batches[0] <= batches[1]
        or signature.output not in ("tensor", "sample")
    ):
        raise ArtifactError(f"signature: batches {batches} or output {signature.output!r} are not understood")
    return signature


def _time_json(time: TimeTables, tensors: dict[str, Tensor]) -> dict[str, Any]:
    tensors["time.keys"] = time.keys
    tensors.update({f"time.tables.{name}": table for name, table in time.tables.items()})
    path = None
    if time.path is not None:
        _collect(time.path, tensors)
        path = graph_to_json(time.path.graph, [])
    return {
        "tables": sorted(time.tables),
        "path": path,
        "path_outputs": list(time.path_outputs),
        "folded": list(time.folded),
    }


def _time_from(value: Any, tensors: _Tensors, signature: Signature) -> TimeTables | None:
    if value is None:
        return None
    path = None if value["path"] is None else graph_from_json(value["path"], tensors, _PATH_DIALECT)
    tables = {name: tensors(f"time.tables.{name}") for name in value["tables"]}
    keys = tensors("time.keys").double()
    if keys.dim() != 1 or not keys.numel() or any(t.dim() < 1 or t.shape[0] != keys.numel() for t in tables.values()):
        raise ArtifactError("time tables: rows and keys disagree")
    time = TimeTables(keys, tables, path, tuple(value["path_outputs"]), tuple(value["folded"]))
    if path is not None:
        _check_path(path, time, signature)
    return time


def _check_path(path: torch.fx.GraphModule, time: TimeTables, signature: Signature) -> None:
    """The path must compute rows of its tables (nothing is executed: shapes only)."""
    if len(placeholders(path.graph)) != 1:
        raise ArtifactError("time path: expected one input")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        outputs = path(torch.empty(signature.min_batch, dtype=signature.inputs[1].dtype))
    wanted = [(signature.min_batch, *time.tables[name].shape[1:]) for name in time.path_outputs]
    if [tuple(o.shape) for o in outputs] != wanted:
        raise ArtifactError("time path: its outputs are not rows of its tables")
