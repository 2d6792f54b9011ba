"""What must be compiled for a launch, and the key that names the result."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from edadm_compile.errors import TargetError
from edadm_compile.kernels.launch import Constant, Launch, LaunchPlan, Operand
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.targets import GRID_LIMIT, OVERLAPPING, TARGETS

#: Triton's names of element types.
_TYPES = {
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip
#: Pointers and integers that are multiples of this many bytes are compiled for wide loads.
DIVISIBILITY = 16
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class KernelRequest:
    """A kernel with everything that is fixed at compile time.

    Attributes:
        kernel: name in the registry.
        entry: "module:function" of the Triton function.
        arch: "sm_80" and so on.
        arguments: name and Triton type of each parameter passed at launch, in order: ("x_ptr", "*i8"), ("rows", "i32").
        divisible: names of those that are multiples of 16 (bytes for pointers).
        constants: name and value of each constexpr, by name; None for a pointer this launch does not use.
        num_warps, num_stages: of the tile.
        fusion: whether a multiplication and an addition may become one rounding; off where EXACT asks for the
            reference's rounding.
    """

    kernel: str
    entry: str
    arch: str
    arguments: tuple[tuple[str, str], ...]
    divisible: tuple[str, ...]
    constants: tuple[tuple[str, Constant | None], ...]
    num_warps: int
    num_stages: int
    fusion: bool

    def to_json(self) -> str:
        """One line of JSON; equal requests give equal text."""
        return json.dumps(vars(self), sort_keys=True)

    @property
    def digest(self) -> str:
        """SHA-256 over the request: ties a compiled kernel in a file to the launches it was compiled for."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def key(self) -> str:
        """Name of the compiled result: SHA-256 over the request, the kernels' sources and Triton's version."""
        text = f"{self.to_json()}\n{sources_digest(self.entry.partition(':')[0])}\n{triton_version()}"
        return hashlib.sha256(text.encode()).hexdigest()


def is_aligned(operand: Operand) -> bool:
    """Whether the operand starts at a multiple of 16 bytes (every buffer does)."""
    return operand.offset * operand.dtype.itemsize % DIVISIBILITY == 0


def request_of(launch: Launch, arch: str) -> KernelRequest:
    """What to compile for `launch`, which must not be "torch".

    Raises:
        TargetError: an architecture that is none of the six, a grid no GPU takes, or an element type without a name
            in Triton.
    """
    found = kernel(launch.kernel)
    values = {**found.values(launch), "OVERLAP": arch in OVERLAPPING}
    if arch not in TARGETS:
        raise TargetError(f"{launch.layer}: got architecture {arch!r}, allowed {', '.join(TARGETS)}")
    grid = found.grid(values)
    if any(not 1 <= n <= limit for n, limit in zip(grid, GRID_LIMIT, strict=True)):
        raise TargetError(f"{launch.layer}: {launch.kernel} needs a grid of {grid}, allowed 1 to {GRID_LIMIT}")
    present = [role for role in found.roles if role in launch.operands]
    for role in present:
        if launch.operands[role].dtype not in _TYPES:
            raise TargetError(f"{launch.layer}: {launch.kernel} cannot take {role} of {launch.operands[role].dtype}")
    arguments = [(f"{role}_ptr", f"*{_TYPES[launch.operands[role].dtype]}") for role in present]
    arguments += [(name, "i32") for name in found.scalars]
    divisible = [f"{role}_ptr" for role in present if is_aligned(launch.operands[role])]
    divisible += [name for name in found.scalars if launch.scalars[name] % DIVISIBILITY == 0]
    constants: dict[str, Constant | None] = {f"{r}_ptr": None for r in found.roles if r not in launch.operands}
    constants |= {name: values[name] for name in (*found.constants, *found.sizes)}
    return KernelRequest(
        kernel=launch.kernel,
        entry=found.entry,
        arch=arch,
        arguments=tuple(arguments),
        divisible=tuple(divisible),
        constants=tuple(sorted(constants.items())),
        num_warps=launch.tile.num_warps,
        num_stages=launch.tile.num_stages,
        fusion=not values.get("EXACT", False),
    )


def requests_of(plan: LaunchPlan) -> Iterator[tuple[Launch, KernelRequest | None]]:
    """Every launch of a plan with its request, None for those that torch runs."""
    for launch in plan.launches:
        yield launch, None if launch.kernel == "torch" else request_of(launch, plan.arch)


@cache
def sources_digest(module: str) -> str:
    """SHA-256 over all device code, the compiling worker, and `module` where it is none of these."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise TargetError(f"no device code: module {module} does not exist")
    files = {*_HERE.glob("triton/*.py"), *_HERE.glob("gluon/*.py"), _HERE / "aot_worker.py", Path(spec.origin)}
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.parts[-2:]):
        digest.update(f"{file.parent.name}/{file.name}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def triton_folder() -> Path:
    """Where Triton is installed (found without importing it).

    Raises:
        TargetError: it is not.
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise TargetError(
            "compiling for a GPU needs Triton 3.6 or newer, which is not installed: pip install 'triton>=3.6', "
            "or compile with --targets none"
        )
    return Path(spec.origin).parent


@cache
def triton_version() -> str:
    """Version of the installed Triton."""
    found = re.search(r"__version__ = ['\"]([^'\"]+)", (triton_folder() / "__init__.py").read_text())
    return found[1] if found else "unknown"
