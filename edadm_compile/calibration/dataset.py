"""The calibration set: model inputs at chosen sampler steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edadm_compile.calibration.tdac import Allocation


@dataclass(frozen=True)
class CalibrationSet:
    """Model inputs for range search and reconstruction, and the float trajectories they were chosen from.

    Under guidance rows 2k and 2k + 1 are sample k without and with its condition; N counts both.

    Attributes:
        x: float32 [N, C, H, W].
        t: [N], in the dtype of the model's timestep input.
        conditions: tensors [N, ...] in signature order.
        step: int64 [N], the sampler step of each sample.
        allocation: samples per step and the scores behind it.
        trajectories: inputs and predictions of the scoring batch at every step, for the mean correction.
        given: SHA-256 of the samples where they are the user's own, else empty.
    """

    x: Tensor
    t: Tensor
    conditions: tuple[Tensor, ...]
    step: Tensor
    allocation: Allocation
    trajectories: Trajectories
    given: str = ""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All model inputs, x first."""
        return (self.x, self.t, *self.conditions)

    def selection(self) -> dict[str, Any]:
        """Timestep, density and diversity of each sampler step, noisiest first, and the density radius.

        The scores are null where the method does not use them; ``given`` is there for a user's own samples. Six digits:
        these are for curves, and text in the file.
        """
        scores = (self.allocation.density, self.allocation.diversity)
        scored = any(bool(s.any()) for s in scores)
        density, diversity = ([_rounded(v) for v in s.tolist()] if scored else None for s in scores)
        return {
            "timesteps": [float(t) for t in self.trajectories.t],
            "density": density,
            "diversity": diversity,
            "radius": _rounded(self.allocation.radius) if scored else None,
            **({"given": self.given} if self.given else {}),
        }

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything in it as tensors by name and plain values."""
        allocation, kept = self.allocation, self.trajectories
        tensors = {
            "x": self.x, "t": self.t, "step": self.step, "counts": allocation.counts, "density": allocation.density,
            "diversity": allocation.diversity, "trajectories.x": kept.x, "trajectories.prediction": kept.prediction,
            "trajectories.t": kept.t,
        }  # fmt: skip
        tensors |= {f"conditions.{i}": c for i, c in enumerate(self.conditions)}
        tensors |= {f"trajectories.conditions.{i}": c for i, c in enumerate(kept.conditions)}
        values = {"radius": allocation.radius, "conditions": len(self.conditions), "given": self.given}
        return tensors, values

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> CalibrationSet:
        """Inverse of `to_tensors`.

        Raises:
            KeyError: something is missing.
        """
        own, kept = (
            tuple(tensors[f"{prefix}conditions.{i}"] for i in range(values["conditions"]))
            for prefix in ("", "trajectories.")
        )
        allocation = Allocation(tensors["counts"], tensors["density"], tensors["diversity"], float(values["radius"]))
        x, prediction, t = (tensors[f"trajectories.{name}"] for name in ("x", "prediction", "t"))
        trajectories = Trajectories(x, prediction, t, kept)
        return cls(tensors["x"], tensors["t"], own, tensors["step"], allocation, trajectories, values["given"])

    def moved(self, keep: Callable[[Tensor], Tensor]) -> CalibrationSet:
        """The same set with every tensor replaced by an equal one."""
        tensors, values = self.to_tensors()
        return self.from_tensors({name: keep(value) for name, value in tensors.items()}, values)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Trajectories:
    """Float trajectories of one batch.

    Under guidance its rows are those of the sampler's doubled batch: the first half without, the second with condition.

    Attributes:
        x: float32 [T, B, C, H, W], model inputs by sampler step.
        prediction: float32 [T, B, ...], the float model's outputs.
        t: [T], timesteps in sampling order.
        conditions: tensors [B, ...].
    """

    x: Tensor
    prediction: Tensor
    t: Tensor
    conditions: tuple[Tensor, ...]
