"""The memory a launch plan runs in: arena, constants, counters, static inputs and output."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

import torch
from torch import Tensor

from edadm_compile.kernels import constants
from edadm_compile.kernels.launch import LaunchPlan, Operand

#: Byte that fills poisoned memory: NaN in every floating type, an implausible code in every integer type.
POISON = 0xFF


class Memory:
    """Storage of one plan on one device.

    Args:
        plan: what will run.
        tensors: a tensor of the program by name.
        device: where.
        poison: fill the arena and the output with `POISON`, so that a read before a write shows.
        shared: constants made already, by specification; plans of other batches of one model share them through it.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        tensors: Callable[[str], Tensor],
        device: torch.device | str,
        poison: bool = False,
        shared: MutableMapping[str, Tensor] | None = None,
    ) -> None:
        self.plan, self.device = plan, torch.device(device)
        self.arena = torch.empty(max(plan.arena, 1), dtype=torch.uint8, device=device)
        self.counters = torch.zeros(max(plan.counters, 1), dtype=torch.int32, device=device)
        self.output = torch.empty(plan.output, dtype=torch.float32, device=device)
        self.inputs = {name: torch.zeros(s, dtype=d, device=device) for name, (s, d) in plan.inputs.items()}
        self.constants: MutableMapping[str, Tensor] = {} if shared is None else shared
        for name, spec in plan.constants.items():
            if name not in self.constants:
                self.constants[name] = _with_slack(constants.make(spec, tensors, device))
        if poison:
            self.poison()

    def poison(self) -> None:
        """Overwrite arena and output."""
        self.arena.fill_(POISON)
        self.output.fill_(float("nan"))

    def poison_buffer(self, index: int) -> None:
        """Overwrite one buffer of the arena: nobody may read it from here on."""
        buffer = self.plan.buffers[index]
        self.arena[buffer.offset : buffer.offset + buffer.size].fill_(POISON)

    def base(self, operand: Operand) -> Tensor:
        """The buffer behind an operand as a flat tensor of its element type."""
        if operand.space == "arena":
            buffer = self.plan.buffers[int(operand.key)]
            return self.arena[buffer.offset : buffer.offset + buffer.size].view(operand.dtype)
        if operand.space == "constant":
            return self.constants[str(operand.key)].view(-1)
        if operand.space == "input":
            return self.inputs[str(operand.key)].view(-1)
        return self.output.view(-1) if operand.space == "output" else self.counters

    def view(self, operand: Operand) -> Tensor:
        """An operand as a strided tensor on its memory."""
        return self.base(operand).as_strided(operand.shape, operand.strides, self._start(operand))

    def _start(self, operand: Operand) -> int:
        return int(self.base(operand).storage_offset()) + operand.offset


def _with_slack(value: Tensor) -> Tensor:
    """A constant whose storage may be read a vector past its end."""
    flat = torch.zeros(value.numel() + 512 // value.element_size(), dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.reshape(-1)
    return flat[: value.numel()].view(value.shape)
