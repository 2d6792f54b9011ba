"""Give every quantizer its scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from edadm_compile.errors import CalibrationError
from edadm_compile.ir.analysis import shape_of
from edadm_compile.ir.footprint import MOST_BYTES, rows_at_once
from edadm_compile.ir.output_codes import pixels_of, writes_codes
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.ir.subgraph import output_of
from edadm_compile.methods import Method
from edadm_compile.passes import extremes
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.checkpoint import Saved
from edadm_compile.passes.freed_memory import give_back
from edadm_compile.passes.kept_values import KeptValues
from edadm_compile.passes.output_ranges import KEEP, ChannelObserver
from edadm_compile.passes.records import layer_records, ranges_state, set_layer_records, set_ranges
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant
from edadm_compile.quant.observers import (
    affine_from_range,
    minmax_weight,
    search_activation,
    search_symmetric,
    search_weight,
)
from edadm_compile.quant.spec import QuantSpec

#: Values kept of each activation for the range search, over the whole calibration set.
KEPT = 40_000
_CHUNK = 64


@dataclass(frozen=True)
class Calibrate:
    """fake_quant graph to fake_quant graph; sets scales, changes no node.

    1. ActFakeQuant without scale → per-tensor affine range with the least mean squared error (min-max: the range seen)
    2. WeightFakeQuant without scale → per-channel symmetric scale with the least squared error (min-max: the largest value)
    3. ActFakeQuant behind a convolution (``deploy``) → the same for every channel; without one the record of a convolution
       in the direct form gets scales and zero points, for engines that write codes
    """

    name: str = "calibrate"
    reads: str = "fake_quant"
    writes: str = "fake_quant"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Observe the calibration set through the float graph, then search ranges."""
        quantizers = [(n, q) for n, q in activation_quantizers(program) if not n.meta.get("output_quantizer")]
        observers = {node: ActivationObserver() for node, _ in quantizers}
        nodes = program.graph_module.graph.nodes
        outputs = {node: ChannelObserver() for node in nodes if writes_codes(node, layer_of(node))}
        peaks = extremes.peaks(program)
        _observe(program, observers, {pixels_of(node): o for node, o in outputs.items()}, peaks, ctx)
        give_back()
        ctx.progress.stage("ranges", len(quantizers) + len(outputs))
        observed: list[extremes.Observed] = []
        for node, quantizer in quantizers:
            found = observers[node]
            scale, zero_point = found.affine(quantizer.spec, extremes.readers(node), ctx.config.recipe)
            quantizer.set_affine(scale, zero_point)
            give_back()  # else the gaps that the candidates of a search leave add up over all searches
            observed.append((node, found.kept.values, found.low, found.high))
            ctx.progress.advance(1, node.name)
        for node, observer in outputs.items():
            _set_output(program, node, observer, minmax=ctx.config.recipe.ranges == "minmax")
            ctx.progress.advance(1, node.name)
        extremes.report_activations(observed, ctx)
        weights = []
        for node, weight_quantizer in weight_quantizers(program):
            weight = get_constant(program.graph_module, str(node.args[0].target))  # type: ignore[union-attr]
            _check_finite(weight, str(node.args[0].target))  # type: ignore[union-attr]
            weight_quantizer.set_scale(_weight_scale(weight, weight_quantizer.spec, ctx.config.recipe.ranges))
            rows = weight.movedim(weight_quantizer.spec.axis or 0, 0).flatten(1)
            weights.append((extremes.readers(node), rows, weight_quantizer.scale))
        extremes.report_weights(weights, ctx)
        # Every process has searched the same; that they also found the same does not hang on equal hardware.
        everywhere = [q for _, q in activation_quantizers(program)]
        ctx.world.agree([v for q in everywhere for v in (q.log_scale, q.zero_point)])
        ctx.world.agree([q.scale for _, q in weight_quantizers(program)])
        stats = {"ranges": {node.name: [o.low, o.high] for node, o in observers.items()}}
        return PassResult(program, True, {**stats, "beyond_float16": extremes.beyond_float16(peaks, ctx)})

    def state(self, program: Program) -> Saved:
        """Scales, zero points and the layer records, which hold those of outputs."""
        saved = ranges_state(program)
        return Saved(saved.tensors, {**saved.values, "layers": layer_records(program)})

    def restore(self, program: Program, saved: Saved) -> Program:
        """Give them back."""
        set_layer_records(program, saved.values["layers"])
        set_ranges(program, saved)
        return program


#: Power of the error that a search minimises.
_POWERS = {"mse": 2.0, "l2.4": 2.4}


def _weight_scale(weight: Tensor, spec: QuantSpec, ranges: str) -> Tensor:
    return minmax_weight(weight, spec) if ranges == "minmax" else search_weight(weight, spec, power=_POWERS[ranges])


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
class ActivationObserver:
    """Running minimum, maximum and a subsample of one activation."""

    low: float = 0.0
    high: float = 0.0
    kept: KeptValues = field(default_factory=KeptValues)

    def update(self, x: Tensor, keep: int, generator: torch.Generator) -> None:
        low, high = torch.aminmax(x)
        # Tensors, because min() and max() of Python would drop a NaN.
        self.low = float(torch.minimum(low, torch.tensor(self.low)))
        self.high = float(torch.maximum(high, torch.tensor(self.high)))
        flat = x.reshape(-1)
        picked = torch.randint(0, flat.numel(), (min(keep, flat.numel()),), generator=generator)
        self.kept.add(flat[picked])

    def affine(self, spec: QuantSpec, name: str, method: Method) -> tuple[Tensor, Tensor]:
        minmax = method.ranges == "minmax"
        if not (self.high - self.low < float("inf")):
            raise CalibrationError(
                f"the input of layer {name} is not finite on the calibration set (range {self.low} to {self.high})"
            )
        if minmax or spec.bits == 16:  # 16 bits: clipping costs more than resolution
            margin = 1.0 if minmax else 1.25  # unseen noise reaches beyond the calibration set
            return affine_from_range(torch.tensor([self.low * margin]), torch.tensor([self.high * margin]), spec)
        search = search_symmetric if method.symmetric else search_activation
        return search(self.kept.values, self.low, self.high, spec, power=_POWERS[method.ranges])


def _set_output(program: Program, node: fx.Node, observer: ChannelObserver, *, minmax: bool) -> None:
    """Rule 3."""
    info = layer_of(node)
    assert info is not None
    scale, zero_point = observer.affine(info.name, minmax=minmax)
    behind = output_of(node)
    if behind is pixels_of(node):
        zeros = tuple(int(z) for z in zero_point)
        # Four digits: the scale is free to choose, and the record is text in the file.
        node.meta["layer"] = replace(info, out_scale=tuple(float(f"{s:.4g}") for s in scale), out_zero_point=zeros)
    else:
        quantizer = program.graph_module.get_submodule(str(behind.target))
        assert isinstance(quantizer, ActFakeQuant)
        quantizer.set_affine(scale.reshape(-1, 1, 1), zero_point.reshape(-1, 1, 1))


def _observe(
    program: Program,
    observers: dict[fx.Node, ActivationObserver],
    outputs: dict[fx.Node, ChannelObserver],
    peaks: dict[fx.Node, extremes.Peak],
    ctx: Context,
) -> None:
    inputs = ctx.calibration.inputs
    total = inputs[0].shape[0]
    chunk = observed_together(program)
    ctx.progress.stage("observing", total)
    batches = -(-total // chunk)
    for observer in observers.values():
        observer.kept.reserve(kept_of_batch(KEPT, chunk, total) * batches)
    for node, channels in outputs.items():
        channels.kept.reserve(kept_of_batch(KEEP, chunk, total) * batches, shape_of(node)[1])
    samplers: list[_Sampler] = [
        (observers, kept_of_batch(KEPT, chunk, total), ctx.generator(2)),
        (outputs, kept_of_batch(KEEP, chunk, total), ctx.generator(4)),
        (peaks, 0, ctx.generator(5)),
    ]
    recorder = _Recorder(program, samplers)
    for rows in torch.arange(total).split(chunk):
        recorder.observe([v[rows] for v in inputs])
        ctx.progress.advance(rows.numel())


def observed_together(program: Program) -> int:
    """Rows of the calibration set that are observed together."""
    return rows_at_once(program, MOST_BYTES, min(_CHUNK, program.signature.max_batch))


def kept_of_batch(keep: int, chunk: int, total: int) -> int:
    """Values to keep of each batch of `chunk` rows for `keep` of all `total`; a single batch gives more where it is not full."""
    return -(-keep * chunk // total)


#: Observers by node, values to keep of each batch, and what draws them.
_Sampler = tuple[Mapping[fx.Node, ActivationObserver | ChannelObserver | extremes.Peak], int, torch.Generator]


class _Recorder(fx.Interpreter):
    def __init__(self, program: Program, samplers: Sequence[_Sampler]) -> None:
        super().__init__(program.graph_module)
        self._program, self._samplers = program, samplers

    def observe(self, inputs: list[Tensor]) -> None:
        batch, lowest = inputs[0].shape[0], self._program.signature.min_batch
        if batch < lowest:  # captured with a fixed batch: repeat rows to fill it
            inputs = [v.repeat(-(-lowest // batch), *[1] * (v.dim() - 1))[:lowest] for v in inputs]
        with torch.no_grad():
            self.run(*self._program.graph_inputs(inputs))

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        for observers, keep, generator in self._samplers:
            if n in observers:
                assert isinstance(result, Tensor)
                observers[n].update(result, keep, generator)
        return result


def _check_finite(weight: Tensor, name: str) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"weight {name} holds NaN or infinite values; the checkpoint is broken")
