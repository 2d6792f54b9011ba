"""Compiled kernels as data, and everything of a model that a GPU needs.

Nothing here needs Triton: this is what a runtime reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edadm_compile.errors import ArtifactError
from edadm_compile.kernels.launch import LaunchPlan

#: PTX parameter types the launcher can pass: a pointer, a 32-bit integer.
POINTER, INTEGER = "u64", "u32"


@dataclass(frozen=True)
class Cubin:
    """One kernel for one architecture.

    Attributes:
        name: entry point.
        data: the ELF image.
        shared: bytes of dynamic shared memory.
        num_warps: warps per program as compiled (more than asked for where the compiler adds producer warps).
        registers: per thread.
        spills: bytes of spill stores and loads in the machine code, 0 in a good kernel.
        params: PTX types of the parameters in order. The last ones, beyond the launch's own arguments, are scratch
            pointers of the compiler; nothing is allocated for them and they are passed as null.
        overlaps: waits for the launches before it by itself, so that it may be enqueued to start early.
        request: `KernelRequest.digest` of what it was compiled for; a launch of other numbers must not run it.
    """

    name: str
    data: bytes = field(repr=False)
    shared: int
    num_warps: int
    registers: int
    spills: int
    params: tuple[str, ...]
    overlaps: bool = False
    request: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything but the bytes, as JSON values."""
        return {
            "name": self.name,
            "shared": self.shared,
            "num_warps": self.num_warps,
            "registers": self.registers,
            "spills": self.spills,
            "params": list(self.params),
            "overlaps": self.overlaps,
            **({"request": self.request} if self.request else {}),
        }

    @classmethod
    def from_json(cls, value: Any, data: bytes) -> Cubin:
        """The reverse of `to_json`.

        Raises:
            ArtifactError: `value` is not what `to_json` writes, or `data` is not an ELF image.
        """
        numbers = ("shared", "num_warps", "registers", "spills")
        if (
            not isinstance(value, dict)
            or set(value) - {"request"} != {"name", "params", "overlaps", *numbers}
            or type(value["overlaps"]) is not bool
            or not all(isinstance(value.get(n, ""), str) and len(value.get(n, "")) <= 4096 for n in ("name", "request"))
            or any(type(value[n]) is not int or value[n] < 0 for n in numbers)
            or not isinstance(value["params"], list)
            or not all(isinstance(p, str) for p in value["params"])
        ):
            raise ArtifactError("a compiled kernel has a malformed description")
        if not data.startswith(b"\x7fELF"):
            raise ArtifactError(f"compiled kernel {value['name']}: {len(data)} bytes that are not machine code")
        return cls(**{**value, "params": tuple(value["params"])}, data=data)


@dataclass(frozen=True)
class Bundle:
    """Device code of a model: launch plans, and which compiled kernel each launch runs.

    Attributes:
        plans: by architecture and batch size.
        keys: for each plan, one key of `cubins` per launch, "" for a launch that torch runs.
        cubins: by key; plans share them.
    """

    plans: Mapping[tuple[str, int], LaunchPlan]
    keys: Mapping[tuple[str, int], tuple[str, ...]]
    cubins: Mapping[str, Cubin] = field(repr=False)

    def __post_init__(self) -> None:
        """Check that plans, keys and kernels fit together.

        Raises:
            ArtifactError: they do not.
        """
        if set(self.plans) != set(self.keys):
            raise ArtifactError(f"device code: plans for {sorted(self.plans)}, kernel keys for {sorted(self.keys)}")
        for (arch, batch), plan in self.plans.items():
            keys = self.keys[arch, batch]
            fits = len(keys) == len(plan.launches) and (plan.arch, plan.batch) == (arch, batch)
            if not fits or any(
                (key == "") != (launch.kernel == "torch") or (key and key not in self.cubins)
                for key, launch in zip(keys, plan.launches, strict=True)
            ):
                raise ArtifactError(f"device code: launches and kernels of {arch} at batch {batch} do not fit together")

    @property
    def archs(self) -> tuple[str, ...]:
        """Architectures there is code for."""
        return tuple(sorted({arch for arch, _ in self.plans}, key=lambda a: int(a.removeprefix("sm_"))))

    def batches(self, arch: str) -> tuple[int, ...]:
        """Batch sizes with a plan for `arch`, ascending."""
        return tuple(sorted(batch for a, batch in self.plans if a == arch))
