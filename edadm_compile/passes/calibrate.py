"""Give every quantizer its scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from edadm_compile.errors import CalibrationError
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant
from edadm_compile.quant.observers import affine_from_range, minmax_weight, search_activation, search_weight

#: Values kept of each activation for the range search, over the whole calibration set.
_KEEP = 40_000
_CHUNK = 64


@dataclass(frozen=True)
class Calibrate:
    """fake_quant graph to fake_quant graph; sets scales, changes no node.

    1. ActFakeQuant without scale → per-tensor affine range with the least mean squared error (min-max: the range seen)
    2. WeightFakeQuant without scale → per-channel symmetric scale with the least squared error (min-max: the largest value)
    """

    name: str = "calibrate"
    reads: str = "fake_quant"
    writes: str = "fake_quant"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Observe the calibration set through the float graph, then search ranges."""
        quantizers = list(activation_quantizers(program))
        observers = {node: _Observer() for node, _ in quantizers}
        _observe(program, observers, ctx)
        ctx.progress.stage("ranges", len(quantizers))
        for node, quantizer in quantizers:
            scale, zero_point = observers[node].affine(quantizer, node.name, minmax=ctx.config.is_baseline)
            quantizer.set_affine(scale, zero_point)
            ctx.progress.advance(1, node.name)
        for node, weight_quantizer in weight_quantizers(program):
            weight = get_constant(program.graph_module, str(node.args[0].target))  # type: ignore[union-attr]
            _check_finite(weight, str(node.args[0].target))  # type: ignore[union-attr]
            search = minmax_weight if ctx.config.is_baseline else search_weight
            weight_quantizer.set_scale(search(weight, weight_quantizer.spec))
        ranges = {node.name: [o.low, o.high] for node, o in observers.items()}
        return PassResult(program, True, {"ranges": ranges})


def activation_quantizers(program: Program) -> Iterator[tuple[fx.Node, ActFakeQuant]]:
    """Activation quantizer nodes and their modules, in graph order."""
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            module = program.graph_module.get_submodule(str(node.target))
            if isinstance(module, ActFakeQuant):
                yield node, module


def weight_quantizers(program: Program) -> Iterator[tuple[fx.Node, WeightFakeQuant]]:
    """Weight quantizer nodes and their modules, in graph order."""
    for node in program.graph_module.graph.nodes:
        if node.op == "call_module":
            module = program.graph_module.get_submodule(str(node.target))
            if isinstance(module, WeightFakeQuant):
                yield node, module


@dataclass
class _Observer:
    """Running minimum, maximum and a subsample of one activation."""

    low: float = 0.0
    high: float = 0.0
    parts: list[Tensor] = field(default_factory=list)

    def update(self, x: Tensor, keep: int, generator: torch.Generator) -> None:
        low, high = torch.aminmax(x)
        # Tensors, because min() and max() of Python would drop a NaN.
        self.low = float(torch.minimum(low, torch.tensor(self.low)))
        self.high = float(torch.maximum(high, torch.tensor(self.high)))
        flat = x.reshape(-1)
        picked = torch.randint(0, flat.numel(), (min(keep, flat.numel()),), generator=generator)
        self.parts.append(flat[picked])

    def affine(self, quantizer: ActFakeQuant, name: str, *, minmax: bool) -> tuple[Tensor, Tensor]:
        if not (self.high - self.low < float("inf")):
            raise CalibrationError(
                f"activation {name} is not finite on the calibration set (range {self.low} to {self.high})"
            )
        spec = quantizer.spec
        if minmax or spec.bits == 16:  # 16 bits: clipping costs more than resolution
            margin = 1.0 if minmax else 1.25  # unseen noise reaches beyond the calibration set
            return affine_from_range(torch.tensor([self.low * margin]), torch.tensor([self.high * margin]), spec)
        return search_activation(torch.cat(self.parts), self.low, self.high, spec)


def _observe(program: Program, observers: dict[fx.Node, _Observer], ctx: Context) -> None:
    inputs = ctx.calibration.inputs
    total = inputs[0].shape[0]
    chunk = min(_CHUNK, program.signature.max_batch)
    generator = ctx.generator(2)
    keep = -(-_KEEP * chunk // total)
    ctx.progress.stage("observing", total)
    recorder = _Recorder(program, observers, keep, generator)
    for rows in torch.arange(total).split(chunk):
        recorder.observe([v[rows] for v in inputs])
        ctx.progress.advance(rows.numel())


class _Recorder(fx.Interpreter):
    def __init__(
        self, program: Program, observers: dict[fx.Node, _Observer], keep: int, generator: torch.Generator
    ) -> None:
        super().__init__(program.graph_module)
        self._program, self._observers, self._keep, self._generator = program, observers, keep, generator

    def observe(self, inputs: list[Tensor]) -> None:
        batch, lowest = inputs[0].shape[0], self._program.signature.min_batch
        if batch < lowest:  # captured with a fixed batch: repeat rows to fill it
            inputs = [v.repeat(-(-lowest // batch), *[1] * (v.dim() - 1))[:lowest] for v in inputs]
        with torch.no_grad():
            self.run(*self._program.graph_inputs(inputs))

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n in self._observers:
            assert isinstance(result, Tensor)
            self._observers[n].update(result, self._keep, self._generator)
        return result


def _check_finite(weight: Tensor, name: str) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"weight {name} holds NaN or infinite values; the checkpoint is broken")
