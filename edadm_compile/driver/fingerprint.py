"""What the result of a compilation depends on, in a form that can be compared part by part."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

import edadm_compile
from edadm_compile.calibration.given import CalibrationSamples, digest_of
from edadm_compile.config import QuantConfig
from edadm_compile.frontend import Source
from edadm_compile.ir.program import Program, constants_of
from edadm_compile.runtime.artifact import digest

#: Parts of the package that decide the numbers.
_CODE = ("calibration", "evaluate", "frontend", "ir", "kernels", "passes", "quant", "config.py", "methods.py", "pipeline.py")  # fmt: skip
#: Packages that do.
_PACKAGES = ("torch", "diffusers", "numpy", "scipy")


def inputs_of(source: Source, config: QuantConfig, given: CalibrationSamples | None = None) -> dict[str, Any]:
    """Model file, data, settings and versions as plain values; see `program_of` for what is known after capture.

    Args:
        given: calibration samples of the user's own.
    """
    sampler = source.sampler
    null = {f"null_{i}": _sha(value) for i, value in enumerate(sampler.null) if value is not None}
    inputs: dict[str, Any] = {
        "model": {"sha256": source.origin.get("sha256", "in memory"), "class": source.signature.source},
        "inputs": {spec.name: f"{list(spec.shape)} {spec.dtype}" for spec in source.signature.inputs},
        **({"other_shapes": [list(shape) for shape in source.other_shapes]} if source.other_shapes else {}),
        "scheduler": sampler.scheduler,
        "sampler": {"steps": sampler.steps, "eta": sampler.eta, "guidance": sampler.guidance, **null},
        "conditions": {name: _sha(value) for name, value in sorted(source.conditions.items())},
        **({} if given is None else {"calibration": digest_of(given.inputs(source.signature))}),
        "config": config.to_dict(),
        "versions": versions(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(inputs))
    return plain


def program_of(program: Program) -> dict[str, str]:
    """The captured float program: its operators, and its constants."""
    tables = {} if program.time is None else program.time.tables
    graph = str(program.graph_module.graph)
    return {"graph": hashlib.sha256(graph.encode()).hexdigest(), "weights": digest(constants_of(program) | tables)}


def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {name: _version(name) for name in _PACKAGES}
    return {
        "edadm_compile": f"{edadm_compile.__version__} (source {_source_digest()[:12]})",
        "python": platform.python_version(),
        **found,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


@cache
def _source_digest() -> str:
    root = Path(edadm_compile.__file__).parent
    sha = hashlib.sha256()
    for part in _CODE:
        files = sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [root / part]
        for file in files:
            sha.update(f"{file.relative_to(root)}\n".encode())
            sha.update(file.read_bytes() if file.exists() else b"")
    return sha.hexdigest()


def _sha(value: torch.Tensor) -> str:
    return digest({"": value})


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs, one phrase for each value, such as ``config.seed was 0, is 1``."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = dict.fromkeys([*before, *after])
    return [
        f"{name} was {_short(before.get(name, 'absent'))}, is {_short(after.get(name, 'absent'))}"
        for name in names
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


_ABSENT = object()


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text[:80]


def identity(fingerprint: dict[str, Any]) -> str:
    """One digest of all of it."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
