"""The ``.qmod`` file: one safetensors file, tensors beside a JSON manifest (docs/qmod_format.md)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edadm_compile.errors import ArtifactError, EdadmError
from edadm_compile.ir.dialects import verify
from edadm_compile.ir.program import LayerInfo, Program, layers
from edadm_compile.ir.valueless import has_values
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.runtime import json_text
from edadm_compile.runtime.atomic import replace_file
from edadm_compile.runtime.container import Header, read_header
from edadm_compile.runtime.device_code import check_bundle, restore, store
from edadm_compile.runtime.limits import DEFAULT, Limits
from edadm_compile.runtime.manifest_check import check_manifest
from edadm_compile.runtime.program_check import check_program
from edadm_compile.runtime.program_json import graph_from_json, graph_to_json, layers_from_json
from edadm_compile.runtime.sampler_json import sampler_from_json, sampler_to_json
from edadm_compile.runtime.shapes import Programs, changed, entries_of, entry_of, not_compiled
from edadm_compile.runtime.signature_json import (
    collect,
    signature_from_json,
    signature_to_json,
    time_from_json,
    time_to_json,
)

FORMAT = "edadm.qmod/1"
_KEY = "edadm"
#: Entries of the manifest that became something else.
_STRUCTURE = ("programs", "tensors", "layers", "signature", "time", "notes", "sampler", "device", "shapes")


@dataclass(frozen=True)
class Artifact:
    """What a ``.qmod`` file holds.

    Attributes:
        qdq: engine-neutral program; the source that everything else can be rebuilt from.
        lowered: program of integer operators.
        manifest: configuration, provenance, quality and versions.
        device: launch plans and compiled kernels for GPUs; None where none were made.
        others: programs of further shapes of x, which share the constants of the first ones.
    """

    qdq: Program
    lowered: Program
    manifest: dict[str, Any] = field(default_factory=dict)
    device: Bundle | None = None
    others: tuple[Programs, ...] = ()

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[C, H, W] of x for every shape in the file, the first one first."""
        return [self.lowered.signature.inputs[0].shape, *(other.shape for other in self.others)]

    def at(self, shape: tuple[int, ...]) -> Artifact:
        """What the file holds for one of its shapes.

        Raises:
            InputError: a shape that was not compiled, with the list of those that were.
        """
        if shape not in self.shapes:
            raise not_compiled(shape, self.shapes)
        if not self.others:
            return self
        programs = {other.shape: other for other in self.others}.get(shape)
        if programs is None:
            return dataclasses.replace(self, others=())
        return Artifact(programs.qdq, programs.lowered, self.manifest)


def to_bytes(artifact: Artifact) -> bytes:
    """Serialise deterministically: the same artifact gives the same bytes."""
    tensors, manifest = contents(artifact)
    stored = _apart({name: _shrink(value) for name, value in sorted(tensors.items())})
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
        collect(program.graph_module, tensors)
        programs[program.dialect] = graph_to_json(program.graph_module.graph, names)
    shapes = [entry_of(o, programs, lambda p: graph_to_json(p.graph_module.graph, names)) for o in artifact.others]
    time = artifact.lowered.time
    manifest = {
        **artifact.manifest,
        "format": FORMAT,
        "signature": signature_to_json(artifact.lowered.signature),
        "sampler": sampler_to_json(artifact.lowered.sampler, artifact.lowered.signature, tensors),
        "notes": list(artifact.lowered.notes),
        "programs": programs,
        "layers": [dataclasses.asdict(info) for info in records],
        "time": None if time is None else time_to_json(time, tensors),
        "device": None if artifact.device is None else store(artifact.device, tensors),
        **({"shapes": shapes} if shapes else {}),
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


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without common memory, which safetensors refuses: a layer that is used twice has its constants twice."""
    apart, seen = {}, set()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen.add(place)
    return apart


def write(artifact: Artifact, path: Path) -> int:
    """Serialise and write atomically; returns the size in bytes.

    Raises:
        ArtifactError: the file cannot be written; an older file of that name is untouched.
    """
    data = to_bytes(artifact)
    write_atomically(path, data)
    return len(data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing (`edadm_compile.runtime.atomic`).

    Raises:
        ArtifactError: the file cannot be written; an older file of that name is untouched.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from None


def read(path: Path, limits: Limits = DEFAULT, *, device_code: bool = True) -> Artifact:
    """Read and check a file. Nothing of it runs; docs/threat_model.md says what is checked.

    Args:
        limits: what the file may ask for.
        device_code: read the GPU code too, else leave it out unread.

    Raises:
        ArtifactError: missing, truncated, altered, foreign, of another version, or beyond `limits`.
    """
    header = read_header(path, limits)
    manifest = _manifest(path, header, limits)
    try:
        check_manifest(manifest)
        tensors = _Tensors(path, manifest.get("tensors"))
        device = restore(manifest.get("device"), tensors, limits) if device_code else None
        signature = signature_from_json(manifest["signature"])
        sampler = sampler_from_json(manifest["sampler"], signature, tensors, limits)
        time = time_from_json(manifest["time"], tensors, signature, limits)
        programs = []
        records = layers_from_json(manifest["layers"])
        for dialect in ("qdq", "lowered"):
            module = graph_from_json(manifest["programs"][dialect], tensors, dialect, records)
            program = Program(module, dialect, signature, sampler, time, tuple(manifest["notes"]))
            verify(program)
            check_program(program, limits)
            programs.append(program)
        if device is not None:
            check_bundle(device, programs[1], limits)
        others = _others(manifest, programs, tensors, records, limits)
        tensors.check_all_used(device_code)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error.__cause__
    except EdadmError as error:
        raise ArtifactError(f"{path}: inconsistent program: {error}") from error
    except Exception as error:  # the manifest passed its checksum: whoever wrote it did so wrongly
        raise ArtifactError(f"{path}: malformed manifest ({type(error).__name__}: {str(error)[:200]})") from error
    kept = {k: v for k, v in manifest.items() if k not in _STRUCTURE}
    return Artifact(programs[0], programs[1], kept, device, others)


def _others(
    manifest: dict[str, Any], first: list[Program], tensors: _Tensors, records: list[LayerInfo], limits: Limits
) -> tuple[Programs, ...]:
    """Programs of the further shapes, built and checked as the first ones are."""
    if "shapes" not in manifest:
        return ()
    if manifest["device"] is not None:
        raise ArtifactError("shapes: GPU code is for files of one shape")
    found = []
    for number, (signature, changes) in enumerate(entries_of(manifest["shapes"], first[0].signature, limits)):
        programs = []
        for like in first:
            nodes = changed(manifest["programs"][like.dialect], changes[like.dialect], number, like.dialect)
            module = graph_from_json(nodes, tensors, like.dialect, records)
            program = dataclasses.replace(like, graph_module=module, signature=signature)
            verify(program)
            check_program(program, limits)
            programs.append(program)
        found.append(Programs(*programs))
    return tuple(found)


def read_manifest(path: Path, limits: Limits = DEFAULT) -> dict[str, Any]:
    """The manifest alone, checked against its digest.

    Raises:
        ArtifactError: as `read`.
    """
    return _manifest(path, read_header(path, limits), limits)


def _manifest(path: Path, header: Header, limits: Limits) -> dict[str, Any]:
    if _KEY not in header.metadata:
        raise ArtifactError(f"{path} is a safetensors file without an edadm manifest: not made by edadm-compile")
    sha, _, text = header.metadata[_KEY].partition("\n")
    if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != sha:
        raise ArtifactError(f"{path} is damaged: the manifest does not match its checksum")
    manifest = json_text.parse(text, f"{path}: manifest", limits)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ArtifactError(f"{path}: format {str(found)[:80]!r}, this version reads {FORMAT!r}; recompile the model")
    return dict(manifest)


class _Tensors:
    """Constants of a file by name, checked together against the digest in the manifest."""

    def __init__(self, path: Path, record: Any) -> None:
        self._path = path
        names = record.get("float32_stored_as_float16") if isinstance(record, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ArtifactError(f"{path}: manifest has no tensor record")
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(f"{path} is not a .qmod file, or is truncated or damaged: {error}") from None
        if digest(stored) != record.get("sha256"):
            raise ArtifactError(f"{path} is damaged: its tensors do not match their checksum")
        widened = set(names)
        if any(name not in stored or stored[name].dtype != torch.float16 for name in widened):
            raise ArtifactError(f"{path}: the manifest widens a tensor that is not stored as float16")
        self._wanted: set[str] = set()
        self._cache: dict[str, Tensor] = {
            name: value.float() if name in widened else value for name, value in stored.items()
        }

    def check_all_used(self, device_code: bool) -> None:
        """Refuse tensors that nothing in the file reads: whoever wrote it hides something, or wrote it wrongly."""
        spare = sorted(n for n in set(self._cache) - self._wanted if device_code or not n.startswith("device."))
        if spare:
            raise ArtifactError(f"{self._path}: {len(spare)} tensors that no program reads, such as {spare[0][:80]!r}")

    def __call__(self, name: str) -> Tensor:
        self._wanted.add(name)
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
