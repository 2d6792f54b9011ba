"""The sampler of a file: plain values in the manifest, condition rows of the unconditional branch as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import SamplerSpec, Signature
from edadm_compile.runtime.limits import DEFAULT, Limits

_PREFIX = "sampler.null."


def sampler_to_json(
    sampler: SamplerSpec, signature: Signature, tensors: dict[str, Tensor] | None = None
) -> dict[str, Any]:
    """Plain values; guidance appears only where there is an unconditional branch.

    Args:
        tensors: receives the condition rows of that branch, named ``sampler.null.<condition>``.
    """
    value: dict[str, Any] = {"scheduler": sampler.scheduler, "steps": sampler.steps, "eta": sampler.eta}
    if not sampler.null:
        return value
    pairs = zip(signature.conditions, sampler.null, strict=True)
    rows = {spec.name: row for spec, row in pairs if row is not None}
    if tensors is not None:
        tensors.update({_PREFIX + name: row for name, row in rows.items()})
    return {**value, "guidance": sampler.guidance, "null": sorted(rows)}


def sampler_from_json(
    value: Any, signature: Signature, tensors: Callable[[str], Tensor], limits: Limits = DEFAULT
) -> SamplerSpec:
    """The sampler of a manifest.

    Args:
        tensors: looks a tensor of the file up by name.
        limits: the most steps, and timesteps of the schedule.

    Raises:
        ArtifactError: an entry of the wrong type, or rows that are no conditions of the signature.
    """
    if not isinstance(value, dict) or not set(value) <= {"scheduler", "steps", "eta", "guidance", "null"}:
        raise ArtifactError("sampler: expected a scheduler configuration, steps, eta, and guidance where there is some")
    eta, guidance, names = value.get("eta", 0.0), value.get("guidance", 1.0), value.get("null", [])
    if not isinstance(value.get("scheduler"), dict) or type(value.get("steps")) is not int or not _number(eta):
        raise ArtifactError("sampler: expected a scheduler configuration, a number of steps and eta")
    length = value["scheduler"].get("num_train_timesteps", 1000)
    if not 1 <= value["steps"] <= limits.steps or type(length) is not int or not 1 <= length <= limits.steps:
        raise ArtifactError(f"sampler: {value['steps']} steps of {str(length)[:40]}, allowed 1 to {limits.steps}")
    if not isinstance(value["scheduler"].get("_class_name"), str):
        raise ArtifactError("sampler: the scheduler has no _class_name")
    known = [spec.name for spec in signature.conditions]
    if not _number(guidance) or not isinstance(names, list) or not all(n in known for n in names):
        raise ArtifactError(
            f"sampler: guidance {guidance!r} without {names!r} is not understood; conditions are {known}"
        )
    if guidance != 1.0 and not names:
        raise ArtifactError(f"sampler: guidance {guidance:g} has no unconditional branch")
    null = tuple(_row(spec.name, tensors) if spec.name in names else None for spec in signature.conditions)
    for spec, row in zip(signature.conditions, null, strict=True):
        if row is not None and (tuple(row.shape) != spec.shape or row.dtype != spec.dtype):
            raise ArtifactError(f"sampler: the row of {spec.name!r} is {list(row.shape)}, expected {list(spec.shape)}")
    return SamplerSpec(value["scheduler"], value["steps"], eta, guidance, null if names else ())


def _row(name: str, tensors: Callable[[str], Tensor]) -> Tensor:
    return tensors(_PREFIX + name)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
