"""TFMQ-DM (arXiv 2311.16503) with what has no integer form here: one set of activation scales per sampler step. Simulated.

Scales of a compiled program are constants, so this runs the fake-quantized program, and puts the scales of a step in place
before each call. The rest is ``--method tfmq-dm``: the temporal block keeps its values (a float table, which is what its
own reconstruction approaches), roundings are learned with activations unquantized, and then the scales are set, in
execution order, each activation already seeing those before it quantized. A step's scales come from the states that the
float model's trajectories have at that step, as many for every step as the other methods use for scoring. Stem, head and
shortcuts are quantized as in all other rows, where the released code keeps them in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.calibration.collect import collect
from edadm_compile.config import QuantConfig
from edadm_compile.frontend import Source
from edadm_compile.ir.program import Program
from edadm_compile.passes.assign_widths import AssignWidths
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.calibrate import Calibrate, activation_quantizers
from edadm_compile.passes.insert_quant import InsertQuant
from edadm_compile.passes.reconstruct import Reconstruct
from edadm_compile.pipeline import capture, float_passes
from edadm_compile.quant.fake_quant import ActFakeQuant
from edadm_compile.quant.observers import search_activation

#: Values of an activation that a step's range is searched on, ends of the range tried in each of two rounds, and the power
#: of the error that is minimised, as in the method's other searches. The released code tries 80 ranges on 16 samples.
_KEEP, _GRID, _POWER = 4096, 8, 2.4
_Affine = tuple[Tensor, Tensor]


class StepScaled:
    """A fake-quantized program whose activation quantizers have scales of their own at every timestep.

    Args:
        timesteps: ascending.
        scales: for each timestep, (scale, zero point) of each quantizer in graph order.
    """

    def __init__(self, program: Program, timesteps: Tensor, scales: list[list[_Affine]]) -> None:
        self.program, self.timesteps, self.scales = program, timesteps.double(), scales
        self._quantizers = [q for _, q in activation_quantizers(program)]

    def __call__(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """Prediction [B, ...]; a timestep in between has the scales of the nearest one."""
        nearest = (t.double()[:, None] - self.timesteps).abs().argmin(dim=1)
        result = torch.empty(0)
        with torch.no_grad():
            for step in nearest.unique().tolist():
                for quantizer, affine in zip(self._quantizers, self.scales[step], strict=True):
                    quantizer.set_affine(*affine)
                rows = nearest == step
                part = self.program(x[rows], t[rows], *(c[rows] for c in conditions))
                if not result.numel():
                    result = part.new_empty((x.shape[0], *part.shape[1:]))
                result[rows] = part
        return result


def simulate(source: Source, config: QuantConfig) -> StepScaled:
    """Quantize a model; nothing is written, and no integer program exists.

    Raises:
        EdadmError: as `edadm_compile.pipeline.compile_source`.
    """
    ctx = Context(config)
    torch.manual_seed(config.seed)
    program = run_passes(capture(source), float_passes(), ctx)
    ctx.calibration = collect(program, config, ctx.generator(1), pool=source.conditions)
    program = run_passes(program, [AssignWidths(), InsertQuant(), Calibrate(), Reconstruct()], ctx)
    return per_step(program, ctx)


def per_step(program: Program, ctx: Context) -> StepScaled:
    """Search the scales of every timestep on the float trajectories' states there."""
    kept = ctx.calibration.trajectories
    times, order = kept.t.double().unique(return_inverse=True)
    recorder = _Setter(program, ctx.generator(7001))
    scales: list[list[_Affine]] = []
    for row in range(times.numel()):
        steps = (
            (order == row).nonzero().flatten()
        )  # more than one where a scheduler calls the model twice at a timestep
        x = kept.x[steps].flatten(0, 1)
        conditions = [c.repeat(steps.numel(), *[1] * (c.dim() - 1)) for c in kept.conditions]
        scales.append(recorder.search([x, kept.t[steps[:1]].expand(x.shape[0]), *conditions]))
    return StepScaled(program, times, scales)


class _Setter(fx.Interpreter):
    """Runs a program and gives each activation quantizer the range of what it is about to quantize."""

    def __init__(self, program: Program, generator: torch.Generator) -> None:
        super().__init__(program.graph_module)
        self._program, self._generator = program, generator
        self._found: list[_Affine] = []

    def search(self, inputs: list[Tensor]) -> list[_Affine]:
        """Scales and zero points in graph order, which is execution order."""
        self._found = []
        with torch.no_grad():
            self.run(*self._program.graph_inputs(inputs))
        return self._found

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, ActFakeQuant):
            low, high = (float(v) for v in args[0].aminmax())
            flat = args[0].reshape(-1)
            sample = flat[torch.randint(0, flat.numel(), (min(_KEEP, flat.numel()),), generator=self._generator)]
            self._found.append(search_activation(sample, low, high, module.spec, grid=_GRID, power=_POWER))
            module.set_affine(*self._found[-1])
        return super().call_module(target, args, kwargs)
