"""Inputs of a benchmark, and the check that comes before any time is told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edadm_compile.calibration import sampler
from edadm_compile.calibration.guidance import null_rows
from edadm_compile.errors import ContractError
from edadm_compile.evaluate.metrics import sqnr
from edadm_compile.ir.program import InputSpec, Program

#: Different inputs that a contender sees in turn.
RING = 8
#: Distinct images of the check; the batch is filled with repetitions of them, and every row is compared.
CHECKED = 2
#: Two runs that round differently differ by the noise of quantization at most: below min(this, noise of the file less
#: a margin), in dB, something else is wrong.
ENOUGH_DB, MARGIN_DB, LEAST_DB = 20.0, 4.0, 3.0
#: Where the noise of the file is not known.
UNKNOWN_DB = 10.0
#: The compiled file may be this much farther from the float model than its own reference engine is.
LOSS_DB = 1.0


def timesteps(program: Program) -> Tensor:
    """Those of the sampler the file was compiled for (the keys of its tables where a table holds just these)."""
    steps = program.sampler.steps
    if program.time is not None and program.time.keys.numel() == steps:
        return program.time.keys.flip(0)
    return torch.tensor(sampler.timesteps(program.sampler), dtype=torch.float64)


def draw(
    program: Program, batch: int, count: int, seed: int, pool: dict[str, Tensor] | None = None
) -> list[list[Tensor]]:
    """Inputs as a sampler gives them: x and t change from call to call, the conditions stay the same tensors.

    Args:
        count: how many.
        pool: condition tensors [N, ...] by name; others are labels, or standard normal.

    Returns:
        x [B, C, H, W], t [B] (one timestep for all images), conditions; float32 and on the host.
    """
    generator = torch.Generator().manual_seed(seed)
    specs = program.signature.inputs
    conditions = [_condition(spec, batch, generator, pool or {}) for spec in specs[2:]]
    if program.sampler.guided:  # a doubled batch, as far as it goes: a single image is one with condition
        empty = null_rows(program.sampler, conditions)
        conditions = [torch.cat((u[: batch // 2], c[batch // 2 :])) for u, c in zip(empty, conditions, strict=True)]
    steps = timesteps(program)
    chosen = steps[torch.linspace(0, len(steps) - 1, count).round().long()]
    return [
        [
            torch.randn((batch, *specs[0].shape), generator=generator),
            t.to(specs[1].dtype).expand(batch).clone(),
            *conditions,
        ]
        for t in chosen
    ]


def _condition(spec: InputSpec, batch: int, generator: torch.Generator, pool: dict[str, Tensor]) -> Tensor:
    if spec.name in pool:
        values = pool[spec.name]
        return values[torch.arange(batch) % len(values)].to(spec.dtype)
    if spec.dtype.is_floating_point:
        return torch.randn((batch, *spec.shape), generator=generator).to(spec.dtype)
    return torch.randint(0, spec.num_classes or 2, (batch, *spec.shape), generator=generator).to(spec.dtype)


def repeated(values: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Rows repeated in turn until there are `batch`."""
    return [v.repeat(-(-batch // len(v)), *[1] * (v.dim() - 1))[:batch] for v in values]


def plan_note(batch: int, plans: Sequence[int]) -> str:
    """How an engine with plans for some batch sizes runs a call of `batch` images."""
    if batch in plans:
        return f"plan for {batch}"
    largest = max(plans)
    if batch < largest:
        return f"no plan for {batch}: the plan for {min(p for p in plans if p > batch)}, filled up"
    rest = batch % largest
    tail = f" and {plan_note(rest, plans)}" if rest else ""
    return f"no plan for {batch}: {batch // largest} times the plan for {largest}{tail}"


@dataclass(frozen=True)
class Truth:
    """What is right for the inputs of the check.

    Attributes:
        inputs: x, t, conditions of `CHECKED` images (fewer for smaller batches).
        reference: prediction of the reference engine.
        original: prediction of the float model in float32; None without a baseline.
        noise_db: SQNR of the file against the float model, from `original` or from the file; None if unknown.
    """

    inputs: list[Tensor]
    reference: Tensor
    original: Tensor | None = None
    noise_db: float | None = None

    @property
    def floor(self) -> float:
        """SQNR against the reference engine, in dB, below which a result is wrong."""
        if self.noise_db is None:
            return UNKNOWN_DB
        return max(LEAST_DB, min(ENOUGH_DB, self.noise_db - MARGIN_DB))


@dataclass(frozen=True)
class Agreement:
    """How close a result is, in dB; inf for equal.

    Attributes:
        reference: to the reference engine.
        original: to the float model, where there is one.
    """

    reference: float
    original: float | None


def compare(result: Tensor, truth: Truth) -> Agreement:
    """Every row of a result [B, ...] against the truth for the row it repeats."""
    result = result.detach().float().cpu()
    usable = result.shape[1:] == truth.reference.shape[1:] and bool(result.isfinite().all())
    if not usable:
        return Agreement(-math.inf, None if truth.original is None else -math.inf)
    rows = zip(repeated([truth.reference], len(result))[0], result, strict=True)
    worst = min(sqnr(reference, row) for reference, row in rows)  # one wrong image of a large batch must show
    if truth.original is None:
        return Agreement(worst, None)
    return Agreement(worst, sqnr(repeated([truth.original], len(result))[0], result))


def check(name: str, batch: int, found: Agreement, truth: Truth, slack: float = 0.0) -> None:
    """Refuse a result of the compiled file that is wrong.

    Args:
        slack: dB of further loss that the engine is allowed.

    Raises:
        ContractError: it is farther from the reference engine, or from the float model, than rounding explains.
    """
    if found.reference < truth.floor - slack:
        raise ContractError(
            f"no times: the {name} engine computes something else than the reference engine at batch {batch}: its worst "
            f"image is at {found.reference:.1f} dB SQNR, rounding alone explains {truth.floor - slack:.1f} dB or more"
        )
    if found.original is not None and truth.original is not None:
        own = sqnr(truth.original, truth.reference)
        if found.original < min(own, 60.0) - LOSS_DB - slack:
            raise ContractError(
                f"no times: the {name} engine is at {found.original:.1f} dB SQNR from the float model at batch {batch}, "
                f"the reference engine at {own:.1f} dB: more is lost than rounding explains"
            )
