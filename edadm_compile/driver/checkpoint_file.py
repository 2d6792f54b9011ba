"""One checkpoint as bytes: a safetensors file whose metadata holds the plain values and checksums of everything."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edadm_compile.passes.checkpoint import Saved
from edadm_compile.runtime.artifact import digest

_KEY = "edadm_checkpoint"


class DamagedCheckpoint(Exception):
    """A file that does not hold what was written, or belongs to another run; the message says which."""


def encode(saved: Saved, run: str) -> bytes:
    """Serialise.

    Args:
        run: identity of the compilation that it belongs to.
    """
    stored: dict[str, Tensor] = {}
    layouts: dict[str, Any] = {}
    for name, value in saved.tensors.items():
        plain = value.is_contiguous() and value.stride() == torch.empty(value.shape, device="meta").stride()
        if not plain and _is_dense(value):
            layouts[name] = [list(value.shape), list(value.stride())]
            value = value.as_strided((value.numel(),), (1,), value.storage_offset())
        stored[name] = value.detach().contiguous().clone()  # safetensors refuses tensors that share memory
    body = {
        "run": run,
        "values": saved.values,
        "seconds": saved.seconds,
        "layouts": layouts,
        "sha256": digest(dict(sorted(stored.items()))),
    }
    text = json.dumps(body, sort_keys=True)
    data: bytes = save(stored, metadata={_KEY: f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"})
    return data


def decode(path: Path, run: str) -> Saved:
    """Read and check a file; its tensors are in memory of their own, with the strides they had.

    Raises:
        DamagedCheckpoint: truncated, altered, or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            checked = (file.metadata() or {}).get(_KEY, "")
            sha, _, text = checked.partition("\n")
            if hashlib.sha256(text.encode()).hexdigest() != sha:
                raise DamagedCheckpoint("its values do not match their checksum")
            body = json.loads(text)
            if body["run"] != run:
                raise DamagedCheckpoint("it belongs to another compilation")
            stored = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
        if digest(stored) != body["sha256"]:
            raise DamagedCheckpoint("its tensors do not match their checksum")
        for name, (shape, strides) in body["layouts"].items():
            stored[name] = stored[name].as_strided(shape, strides)
        return Saved(stored, body["values"], float(body["seconds"]))
    except DamagedCheckpoint:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {str(error)[:200]}") from None


def _is_dense(value: Tensor) -> bool:
    """Whether the values fill their memory without gaps or overlaps, in some order of the dimensions."""
    expected = 1
    for size, stride in sorted(zip(value.shape, value.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return value.numel() > 0
