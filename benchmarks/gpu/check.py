"""Is a launch right? Asked before it is timed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edadm_compile.driver.single_launch import Runner, agrees, fill
from edadm_compile.driver.synthetic import Settings, Synthetic
from edadm_compile.kernels import groupnorm, qconv2d, qlinear
from edadm_compile.kernels.launch import Launch
from edadm_compile.kernels.memory import Memory
from edadm_compile.kernels.registry import kernel
from edadm_compile.quant import packing

#: Rows of the exact product that are made at once.
_ROWS = 4096
#: Absolute error allowed in float16 results of norms and attention, whose values are of order 1.
_FLOAT_ERROR = 4e-3


def accumulators(made: Synthetic, memory: Memory) -> Tensor:
    """The exact integer products of a matrix launch, float64 [pixels, O], on the device of `memory`."""
    launch = made.launch
    values = kernel(launch.kernel).values(launch)
    if launch.kernel.startswith("qlinear"):
        values = qlinear.as_convolution(values)
    pad = memory.view(launch.operands["pad"]) if "pad" in launch.operands else None
    x = memory.view(launch.operands["x"])
    columns = qconv2d.columns(x, pad, values, values["C"], values["X_STRIDE"])
    weight = packing.unpack_matrix(made.tensors["w"], values["BITS"], columns.shape[1]).to(memory.device).double()
    return torch.cat([part.double() @ weight.T for part in columns.split(_ROWS)])


def _expected(made: Synthetic, memory: Memory) -> dict[str, Tensor]:
    """float16 and codes of a matrix launch, by the formulas of `kernels.qconv2d`."""
    constants = {name: made.tensors[name].to(memory.device) for name in ("multiplier", "bias", "scale", "zero")}
    value = accumulators(made, memory).float() * constants["multiplier"] + constants["bias"]
    codes = torch.round((value * (1 / constants["scale"])).clamp(-1e6, 1e6)) + constants["zero"]
    return {"out": value.half(), "out_q": codes.clamp(-128, 127).to(torch.int8)}


def matrix(made: Synthetic, small: Synthetic, runner: Runner) -> str:
    """Why a matrix launch is wrong; empty when it is right.

    With small codes, multipliers of 1 and no bias, float16 holds every accumulator below 2048 (beyond that, its
    rounding): results must be equal. With codes of full range they must agree up to the rounding of a multiply-add.

    Args:
        made: as it will be timed.
        small: the same launch with the tensors of `Settings.small`.
    """
    for case in (small, made):
        memory = Memory(made.plan, case.tensors.__getitem__, runner.device, poison=True)
        fill(memory)
        if case is small:
            x = memory.view(made.launch.operands["x"])
            x.copy_((x.int() % 7 - 3).to(torch.int8))
        runner.bind(memory)()
        for role, expected in _expected(case, memory).items():
            if role not in made.launch.writes:
                continue
            found = memory.view(made.launch.operands[role])
            right = torch.equal(found, expected) if case is small else agrees(found, expected)
            if not right:
                wrong = int((found != expected).sum())
                kind = "exact products" if case is small else "results"
                return f"{role} differs from the {kind} in {wrong} of {expected.numel()} places"
        if bool(memory.counters.any()):
            return "a counter is left behind"
    return ""


def floating(made: Synthetic, runner: Runner) -> str:
    """Why a norm or an attention is wrong; empty when it is right: against the reference kernel in float32."""
    launch, memory = made.launch, Memory(made.plan, made.tensors.__getitem__, runner.device, poison=True)
    fill(memory)
    settle(memory, launch)
    tensors = {role: memory.view(operand) for role, operand in launch.operands.items()}
    expected = {role: torch.empty_like(tensors[role]) for role in launch.writes}
    found = kernel(launch.kernel)
    found.reference({**tensors, **expected}, found.values(launch))
    runner.bind(memory)()
    for role, value in expected.items():
        if value.dtype == torch.int8:
            right = agrees(tensors[role], value)
        else:
            error = (tensors[role].double() - value.double()).abs()
            right = bool((error <= _FLOAT_ERROR * (1 + value.double().abs())).all())
        if not right:
            return f"{role} differs from the reference kernel"
    return ""


def settle(memory: Memory, launch: Launch) -> None:
    """Statistics that a norm finds beside its input become those of the input."""
    if launch.kernel == "groupnorm" and "stats" in launch.operands:
        x, stats = (memory.view(launch.operands[role]) for role in ("x", "stats"))
        batch, parts, _, channels = stats.shape
        groupnorm.write_moments(x.float().reshape(batch, parts, -1, channels), stats)


def small_settings(settings: Settings) -> Settings:
    """The same launch on small codes."""
    return replace(settings, small=True)
