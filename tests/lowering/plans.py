"""Plans for tests, and their execution on the CPU over poisoned memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.kernels import execute
from edadm_compile.kernels.launch import LaunchPlan
from edadm_compile.kernels.memory import Memory
from edadm_compile.lowering.builder import Target
from edadm_compile.lowering.schedule import make_plan
from edadm_compile.pipeline import compile_source
from tests.graphs import source_of

#: Rounds to nearest on a handful of samples: a lowered program in a second.
QUICK: dict[str, Any] = {
    "method": "minmax", "calib_samples": 4, "tdac": TdacConfig(trajectories=1),
    "reconstruction": ReconstructionConfig(iters=0),
}  # fmt: skip


def lowered(module: nn.Module, shape: tuple[int, int, int] = (3, 8, 8), source: Any = None, **changes: Any) -> Program:
    """A module compiled quickly."""
    options = changes.pop("options", {})
    config = QuantConfig(**{**QUICK, **changes})
    return compile_source(source or source_of(module, shape, 2, **options), config, quality=False).lowered


def plan_of(program: Program, batch: int = 2, **target: Any) -> LaunchPlan:
    """A plan for the CPU: float32 between kernels, exact rounding."""
    return make_plan(program, Target("", batch, **{"store": torch.float32, "exact": True, **target}))


def inputs_of(program: Program, batch: int, seed: int = 0) -> list[Tensor]:
    """x, t from the sampler's timesteps, conditions."""
    generator = torch.Generator().manual_seed(seed)
    values: list[Tensor] = []
    for spec in program.signature.inputs:
        if spec.role == "t":
            known = program.time.keys if program.time is not None else torch.arange(100.0)
            values.append(known[torch.randint(0, len(known), (batch,), generator=generator)].to(spec.dtype))
        elif spec.dtype.is_floating_point:
            values.append(torch.randn((batch, *spec.shape), generator=generator).to(spec.dtype))
        else:
            values.append(torch.randint(0, spec.num_classes or 2, (batch, *spec.shape), generator=generator))
    return values


def memory_of(program: Program, plan: LaunchPlan) -> Memory:
    return Memory(plan, lambda name: get_constant(program.graph_module, name), "cpu", poison=True)


def table_rows(program: Program, plan: LaunchPlan, t: Tensor) -> list[Tensor]:
    """What an engine writes into the input that holds the time tables."""
    if not plan.tables or program.time is None:
        return []
    rows = program.time.lookup(t)
    return [torch.cat([rows[name].reshape(len(t), -1).float() for name in plan.tables], dim=1)]


def run(program: Program, plan: LaunchPlan, inputs: list[Tensor], backend: Any = execute.reference) -> Tensor:
    """Execute a plan over poisoned memory, poisoning every buffer after its last reader."""
    memory = memory_of(program, plan)
    values = [v.to(s.dtype) for v, s in zip(inputs, program.signature.inputs, strict=True)]
    with torch.no_grad():
        return execute.run(memory, values + table_rows(program, plan, inputs[1]), backend, check_lifetimes=True)
