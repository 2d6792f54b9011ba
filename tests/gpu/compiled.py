"""Run a registered kernel as the CUDA engine does: compiled ahead of time, launched through the driver."""

from types import SimpleNamespace

import torch

from edadm_compile.kernels import aot, request
from edadm_compile.kernels.launch import Launch, LaunchPlan, Operand
from edadm_compile.kernels.targets import arch_of
from edadm_compile.runtime.engines.cuda_driver import cuda_driver
from edadm_compile.runtime.engines.cuda_plan import PlanRunner


def whole(tensor):
    """All the memory behind a view, flat."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def operand_of(role, tensor):
    return Operand("input", role, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())


def run_compiled(name, tensors, constants, scalars, tile, *, arch=None, device="cuda", driver=None):
    """Launch a kernel on copies of CPU tensors in place, gaps between their elements included."""
    constants = {key: value for key, value in constants.items() if key in request.kernel(name).constants}
    operands = {role: operand_of(role, tensor) for role, tensor in tensors.items()}
    launch = Launch(name, name, operands, constants, scalars, tile)
    plan = LaunchPlan(arch or arch_of(), 1, torch.float32, (launch,), (), 0, {}, 0, {}, (1,))
    copies = {role: whole(tensor).to(device, copy=True) for role, tensor in tensors.items()}
    memory = SimpleNamespace(
        plan=plan,
        device=torch.device(device),
        output=None,
        view=lambda o: copies[o.key].as_strided(o.shape, o.strides, o.offset),
    )
    cubins = aot.compile_plans([plan])
    PlanRunner(memory, aot.plan_keys(plan), cubins, driver or cuda_driver(), graphs=False).run(conditioning=True)
    for role, tensor in tensors.items():
        whole(tensor).copy_(copies[role])
