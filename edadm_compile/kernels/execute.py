"""Execute a launch plan on the CPU: reference kernels, or Triton's interpreter, over the planned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edadm_compile.kernels import library
from edadm_compile.kernels.launch import Launch, LaunchPlan
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.registry import kernel

Backend = Callable[[Launch, dict[str, Tensor]], None]


def reference(launch: Launch, tensors: dict[str, Tensor]) -> None:
    """Run a launch with its kernel's reference in torch."""
    if launch.kernel == "torch":
        library.run(launch, tensors)
        return
    found = kernel(launch.kernel)
    found.reference(tensors, found.values(launch))


def interpreted(launch: Launch, tensors: dict[str, Tensor]) -> None:
    """Run a launch under Triton's interpreter (the process must have been started with TRITON_INTERPRET=1)."""
    if launch.kernel == "torch":
        library.run(launch, tensors)
        return
    found = kernel(launch.kernel)
    values = found.values(launch)
    pointers = [tensors.get(role) for role in found.roles]
    scalars = [launch.scalars[name] for name in found.scalars]
    named: dict[str, Any] = {n: values[n] for n in (*found.constants, *found.sizes)}
    found.function()[found.grid(values)](*pointers, *scalars, **named)


def run(
    memory: Memory, inputs: Sequence[Tensor], backend: Backend = reference, check_lifetimes: bool = False
) -> Tensor:
    """Execute every launch in order.

    Args:
        memory: of the plan.
        inputs: in the order of ``plan.inputs``.
        backend: what executes one launch.
        check_lifetimes: poison each buffer after its last reader, so that any later read shows.

    Returns:
        float32, the output (a copy).
    """
    plan: LaunchPlan = memory.plan
    for target, value in zip(memory.inputs.values(), inputs, strict=True):
        target.copy_(value)
    for i, launch in enumerate(plan.launches):
        backend(launch, {role: memory.view(operand) for role, operand in launch.operands.items()})
        if check_lifetimes:
            for index, buffer in enumerate(plan.buffers):
                if buffer.size and buffer.last == i:
                    memory.poison_buffer(index)
    if bool(memory.counters.any()):
        raise AssertionError("a kernel left a counter behind")
    return torch.clone(memory.output)
