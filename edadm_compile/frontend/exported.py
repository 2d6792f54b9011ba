"""torch.export archives (.pt2), recognised by content: people name them .pt as well."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from edadm_compile.calibration.schedulers import fractional_timestep
from edadm_compile.errors import InputError
from edadm_compile.frontend.archive_check import open_archive
from edadm_compile.frontend.source import Source
from edadm_compile.frontend.zip_check import is_zip
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature
from edadm_compile.passes.capture import MAX_BATCH


def is_exported_program(path: Path) -> bool:
    """Whether a file is a torch.export archive."""
    if not is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # only the end of it is that of an archive
        return False
    return any(n.endswith(("archive_format", "serialized_exported_program.json")) for n in names)


def load(
    path: Path, sampler: SamplerSpec, pool: dict[str, Tensor], origin: dict[str, Any], trusted: bool = False
) -> Source:
    """Load an archive; shapes, names and batch limits come from the program itself.

    Args:
        trusted: the archive may hold what can run code (``--trust-pickle``).

    Raises:
        InputError: unreadable, able to run code, or inputs that are not (x [B, C, H, W], t [B], *conditions [B, ...]).
    """
    try:
        program = open_archive(path, trusted)
        signature = _signature(program, path, pool)
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise InputError(
            f"{path} is a torch.export archive that this torch {torch.__version__} cannot read: {reason}"
        ) from error
    fractional = fractional_timestep(sampler)
    if fractional is not None and not signature.inputs[1].dtype.is_floating_point:
        raise InputError(
            f'{path} takes whole timesteps, and the scheduler gives {fractional:g}; set its "timestep_spacing" to "leading" or '
            '"trailing", or export the program with float timesteps'
        )
    return Source(signature, sampler, None, program, {}, pool, origin=origin)


def _signature(program: ExportedProgram, path: Path, pool: dict[str, Tensor]) -> Signature:
    names = [n for n in program.graph_signature.user_inputs if isinstance(n, str)]
    values = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    tensors = [(n, values[n]) for n in names if isinstance(values.get(n), Tensor)]
    if len(tensors) < 2 or tensors[0][1].dim() != 4 or tensors[1][1].dim() != 1:
        shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in tensors)
        raise InputError(
            f"{path}: inputs are {shapes or 'missing'}; expected x [B, C, H, W], t [B], then conditions [B, ...]"
        )
    unknown = sorted(set(pool) - {n for n, _ in tensors[2:]})
    if unknown:
        raise InputError(
            f"{path}: condition {unknown[0]!r} is not an input; the program takes {', '.join(n for n, _ in tensors)}"
        )
    lowest, largest = batch_range(program, tensors[0][1])
    inputs = []
    for i, (name, value) in enumerate(tensors):
        if i >= 2 and name not in pool:
            raise InputError(
                f"{path}: condition {name!r} needs calibration values: --cond FILE.safetensors with a tensor {name!r} "
                f"[{', '.join(['N', *map(str, value.shape[1:])])}]"
            )
        sizes = tuple(int(s) for s in value.shape[1:])
        if i >= 2 and tuple(pool[name].shape[1:]) != sizes:
            raise InputError(
                f"{path}: condition {name!r} has rows of shape {list(sizes)}, --cond gives {list(pool[name].shape[1:])}"
            )
        inputs.append(InputSpec(name, sizes, value.dtype, ("x", "t")[i] if i < 2 else "cond"))
    return Signature(tuple(inputs), "tensor", largest, lowest, source="torch.export program")


def batch_range(program: ExportedProgram, x: Tensor) -> tuple[int, int]:
    """Smallest and largest batch of an input, `x` being its placeholder's value."""
    size = x.shape[0]
    if not isinstance(size, torch.SymInt):
        return int(size), int(size)
    bounds = program.range_constraints.get(size.node.expr)
    upper = MAX_BATCH if bounds is None else bounds.upper
    lower = 1 if bounds is None else bounds.lower
    try:
        return max(1, int(lower)), min(MAX_BATCH, int(upper))
    except (TypeError, OverflowError, AttributeError):  # unbounded: sympy and torch have several infinities
        return max(1, int(lower)), MAX_BATCH
