"""The GPU architectures code is made for, and their limits."""

from __future__ import annotations

import torch

from edadm_compile.errors import InputError, did_you_mean

#: Shared memory that one program may ask for, in bytes, by architecture.
SHARED_LIMIT = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}
#: Everything that can be compiled for.
TARGETS = tuple(SHARED_LIMIT)
#: Compiled for where no GPU is present: A100, L4 and RTX 40, H100 and H200.
DEFAULT_TARGETS = ("sm_80", "sm_89", "sm_90")
#: Can set up a launch while the one before it still runs.
OVERLAPPING = ("sm_90", "sm_100", "sm_120")
#: Largest register number a thread can have.
REGISTER_LIMIT = 255
#: Programs along x, y, z.
GRID_LIMIT = (2**31 - 1, 65535, 65535)


def capability(arch: str) -> int:
    """The compute capability as Triton counts it: 90 for "sm_90"."""
    return int(arch.removeprefix("sm_"))


def arch_of(device: torch.device | str | int | None = None) -> str:
    """Architecture of a CUDA device (the current one by default), for example "sm_90"; starts CUDA."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Architectures named by an option.

    Args:
        text: names joined by commas, "all", "none", or None for the GPU of this machine; a machine without one, or
            with one that is not in `TARGETS`, gets `DEFAULT_TARGETS`.

    Returns:
        names in the order of `TARGETS`, each once.

    Raises:
        InputError: a name that is none of the six.
    """
    if text is None:
        present = arch_of() if torch.cuda.is_available() else ""
        return (present,) if present in TARGETS else DEFAULT_TARGETS
    if text in ("all", "none"):
        return TARGETS if text == "all" else ()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            near = did_you_mean(name, (*TARGETS, "all", "none"))
            raise InputError(f"targets: got {name!r}, allowed {', '.join(TARGETS)}, or all, or none{near}")
    return tuple(name for name in TARGETS if name in names)
