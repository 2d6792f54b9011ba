"""Programs whose large constants have shapes and types but no values: passes that only look at structure run on them as usual."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edadm_compile.ir.analysis import constant_target
from edadm_compile.ir.program import Program, get_constant, set_constant

#: Constants of more elements lose their values; biases and norms keep them.
_KEPT = 1 << 14


def without_values(program: Program) -> Program:
    """A copy of a program in which large constants are fake tensors; the originals are not read."""
    program = program.fork()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = program.graph_module
    for target in {t for n in module.graph.nodes if (t := constant_target(n))}:
        value = get_constant(module, target)
        if value.numel() > _KEPT:
            with mode:
                empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
            set_constant(module, target, empty)
    return program


def has_values(value: Tensor) -> bool:
    """Whether a tensor holds numbers."""
    return not isinstance(value, FakeTensor)
