"""Fine-grained block reconstruction (FBR), arXiv 2401.04585 section 3.3, over units found from the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edadm_compile.config import QuantConfig
from edadm_compile.errors import CalibrationError
from edadm_compile.ir.analysis import is_batched, layer_weight
from edadm_compile.ir.execute import run_nodes
from edadm_compile.ir.footprint import kept_by, rows_within
from edadm_compile.ir.program import Program
from edadm_compile.ir.subgraph import Unit, find_units
from edadm_compile.parallel.world import Share, World
from edadm_compile.passes.base import Context, PassResult
from edadm_compile.passes.freed_memory import give_back
from edadm_compile.passes.layer_taps import run_tapped
from edadm_compile.passes.phase import Phase, Trained
from edadm_compile.passes.records import learned_state
from edadm_compile.passes.row_shares import DividedMasks, share_of
from edadm_compile.passes.streams import Streams, switched_off
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant

#: Bytes of values that a training step keeps for its gradients; a larger batch is taken in pieces.
STEP_BYTES = 4 << 30
#: Tensors that the gradient of an activation quantizer keeps besides its result.
KEPT_BY_QUANTIZER = 3
#: Rounding of wide weights moves less: their learning rate is this fraction of ``lr_weight``.
_WIDE_FACTOR = 0.4


@dataclass(frozen=True)
class Reconstruct:
    """fake_quant graph to fake_quant graph; learns roundings and activation scales, changes no node.

    1. unit with round-to-nearest codes and searched scales → learned codes and scales that minimise
       ``L = |y - y*|² / |y*|² + lambda * sum_j |o_j - o_j*|² / |o_j*|²``

    y is the unit's output, o_j the outputs of its inner layers, * the float model's. The loss of an inner layer trains
    that layer's roundings alone (`local_layer_losses`); activation scales follow the unit's output. Inputs are those the already
    quantized prefix produces. The float and the quantized model advance through the graph together, unit by unit,
    so no prefix is ever computed twice. Several processes each hold the values of their share of the samples, and add up
    the gradients of every step.
    """

    name: str = "reconstruct"
    reads: str = "fake_quant"
    writes: str = "fake_quant"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Reconstruct every unit in execution order."""
        config, method = ctx.config.reconstruction, ctx.config.recipe
        if config.iters == 0 or not method.phases:
            return PassResult(program, False, {"units": []})
        units = find_units(program, config.max_layers)
        ctx.progress.stage("reconstruct", len(method.phases) * len(units) * config.iters)
        reports: list[dict[str, Any]] = []
        for phase in method.phases:
            with switched_off(program, *((ActFakeQuant,) if phase == "weights" else ())):
                reports += Phase(program, units, phase, ctx, len(reports), _train).run()
        return PassResult(program, True, {"units": reports, "caches": ctx.caches.report()})


def _train(program: Program, unit: Unit, streams: Streams, phase: str, ctx: Context, salt: int, label: str) -> Trained:
    share = share_of(streams.total, ctx)
    trainer = UnitTrainer(program, unit, streams, ctx.config, phase, ctx.generator(salt), share)
    report = trainer.run(ctx, label)
    return Trained(report, trainer.learned())


def training_bytes(program: Program, closure: Sequence[fx.Node]) -> float:
    """Bytes per sample that a training step through a closure keeps."""
    quantizers = [n for n in closure if n.op == "call_module" and is_batched(n)]
    return kept_by(closure) + KEPT_BY_QUANTIZER * kept_by(quantizers)


class UnitTrainer:
    """Optimises one unit."""

    def __init__(
        self,
        program: Program,
        unit: Unit,
        streams: Streams,
        config: QuantConfig,
        phase: str,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> None:
        self.program, self.unit, self.generator = program, unit, generator
        self.config, self.method = config.reconstruction, config.recipe
        self.share = share or World().share(streams.total)
        self.closure = streams.closure(unit)
        self.inputs = streams.stored_inputs(self.closure)
        self.float_in = {n: streams.float_values[n] for n in self.inputs}
        self.quant_in = {n: streams.quant_values[n] for n in self.inputs}
        self.watched = [n for n in unit.layers if n is not unit.output]
        self.local = self.method.local_layer_losses and self.method.block_loss_weight > 0
        if self.method.layer_loss_weight == 0 or (self.local and phase == "scales"):
            self.watched = []
        self.streams = streams
        stored = getattr(torch, self.config.target_dtype)
        self.targets = streams.float_targets(self.closure, [unit.output, *self.watched], stored)
        self.rowless = [n for n in (unit.output, *self.watched) if n not in self.targets]
        self.energy = self._energies()
        trained = () if phase == "scales" else unit.layers  # with "weights", activation quantizers are switched off
        self.weights = [(n, self._quantizer(n.args[1]), layer_weight(program, n)) for n in trained]
        # A closure may recompute what belongs to an earlier unit: its quantizers are final.
        modules = [
            self._module(n) for n in self.closure if n.op == "call_module" and (n in unit.nodes or not streams.owned(n))
        ]
        self.activations = [m for m in modules if isinstance(m, ActFakeQuant)]
        self.row_bytes = training_bytes(program, self.closure)

    def _module(self, node: fx.Node) -> nn.Module:
        return self.program.graph_module.get_submodule(str(node.target))

    def _quantizer(self, node: Any) -> WeightFakeQuant:
        module = self._module(node)
        assert isinstance(module, WeightFakeQuant)
        return module

    def run(self, ctx: Context, label: str) -> dict[str, float]:
        """Train, fix the roundings, and return losses before and after."""
        config = self.config
        before = self._finite(self._mean_loss())
        groups = self._parameter_groups()
        if not groups:  # only scales are trained, and no activation in this unit has one of its own
            ctx.progress.advance(config.iters, label)
            self._release()
            return {"before": before, "after": before}
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.iters)
        self._set_drop(True)
        every = max(1, config.iters // 20)
        for step in range(config.iters):
            optimizer.zero_grad(set_to_none=True)
            loss = self._descend(step)
            self._add_gradients(optimizer)
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == config.iters:
                done = every if (step + 1) % every == 0 else config.iters % every
                ctx.progress.advance(done, f"{label} loss {self._finite(float(loss)):.2e}")
        self._finish()
        give_back()  # the gaps that training left would come on top of what the closing measurement takes
        after = self._finite(self._mean_loss())
        self._release()
        return {"before": before, "after": after}

    def learned(self) -> dict[str, Tensor]:
        """What training changed, by quantizer."""
        return learned_state(self.program, [q for _, q, _ in self.weights], self.activations)

    def _release(self) -> None:
        self.streams.caches.release(*self.targets.values())
        self.targets = {}

    def _finite(self, loss: float) -> float:
        """The loss, unless squares of the unit's values overflow float32: rounding learned from NaN would be noise."""
        if math.isfinite(loss):
            return loss
        largest = max(float(v.abs().max()) for v in self.quant_in.values())
        raise CalibrationError(
            f"the loss of block {self.unit.name} is {loss}: its values (inputs reach {largest:.3g}) are too large to be "
            "squared in float32; scale the model down, or leave these layers in float with a rule (weight_bits = 32)"
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        narrow: list[nn.Parameter] = []
        wide: list[nn.Parameter] = []
        for _, quantizer, weight in self.weights:
            alpha = quantizer.start_rounding(weight)
            (narrow if quantizer.spec.bits <= 4 else wide).append(alpha)
        scales = []
        for activation in self.activations:
            if activation.enabled and activation.spec.bits < 16:
                activation.log_scale.requires_grad_(True)
                scales.append(activation.log_scale)
        rates = (
            (narrow, self.config.lr_weight),
            (wide, self.config.lr_weight * _WIDE_FACTOR),
            (scales, self.config.lr_scale),
        )
        return [{"params": params, "lr": lr} for params, lr in rates if params]

    def _rows(self) -> Tensor:
        size = self.config.batch
        lowest = self.program.signature.min_batch
        size = lowest if lowest == self.program.signature.max_batch else min(size, self.program.signature.max_batch)
        return torch.randint(0, self.share.total, (size,), generator=self.generator)

    def _energies(self) -> dict[fx.Node, Tensor]:
        """Mean square of each target: of stored ones over all samples, of computed ones over the first."""
        first = self.share.local(self._parts()[0])
        means = {n: self.share.weight * self.streams.caches.mean_square(v) for n, v in self.targets.items()}
        means |= {n: first.weight * v.square().mean() for n, v in self._computed(first.rows).items()}
        return {n: v.clamp(min=1e-12) for n, v in zip(means, self.share.sums(list(means.values())), strict=True)}

    def _add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.share.world.add(gradients)

    def _descend(self, step: int) -> Tensor:
        """Gradients of the loss of a batch, and that loss; in pieces where its values would take too much memory together.

        A piece is cut from the whole batch, so that all processes run as many and draw the same masks.
        """
        rows = self._rows()
        pieces = rows.split(self._at_once(rows.numel()))
        losses = []
        for number, piece in enumerate(pieces, 1):
            part = self.share.local(piece)
            self.pool.select(part)
            loss = piece.numel() / rows.numel() * part.weight * self.loss(part.rows)
            if number == len(pieces):
                loss = loss + self._regulariser(step) / self.share.world.size
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _at_once(self, rows: int) -> int:
        if self.program.signature.min_batch > 1:  # the last piece could be too small for the graph
            return rows
        return rows_within(STEP_BYTES, self.row_bytes, rows)

    def loss(self, rows: Tensor, *, mix: bool = True) -> Tensor:
        values: dict[fx.Node, Any] = {n: self._input(n, rows, mix) for n in self.inputs}
        taps = run_tapped(self.program.graph_module, self.closure, values, self.watched if self.local else ())
        targets = self._sampled(rows)
        loss = self.method.block_loss_weight * self._error(self.unit.output, values, targets)
        for node in self.watched:
            loss = loss + self.method.layer_loss_weight * self._error(node, values | taps, targets)
        return loss

    def _error(self, node: fx.Node, values: dict[fx.Node, Any], targets: dict[fx.Node, Tensor]) -> Tensor:
        """Mean squared error over the target's energy, or as released: summed over the second dimension."""
        difference: Tensor = (values[node] - targets[node]).square()
        if self.method.normalised:
            return difference.mean() / self.energy[node]
        return difference.sum(dim=1).mean() if difference.dim() > 1 else difference.mean()

    def _sampled(self, rows: Tensor) -> dict[fx.Node, Tensor]:
        """Targets of some samples: stored ones by row, others computed."""
        return {n: v[rows].float() for n, v in self.targets.items()} | self._computed(rows)

    def _computed(self, rows: Tensor) -> dict[fx.Node, Tensor]:
        return self.streams.float_rows(self.closure, self.rowless, rows) if self.rowless else {}

    def _input(self, node: fx.Node, rows: Tensor, mix: bool) -> Tensor:
        quantized = self.quant_in[node][rows]
        if not mix or self.method.qdrop == 0 or not quantized.is_floating_point():
            return quantized
        return torch.where(self.pool.take(quantized.shape), self.float_in[node][rows], quantized)

    def _set_drop(self, on: bool) -> None:
        active = on and self.method.qdrop > 0
        self.pool = DividedMasks(self.method.qdrop, self.generator)
        for activation in self.activations:
            activation.drop = self.pool if active else None

    def _regulariser(self, step: int) -> Tensor | float:
        """AdaRound's ``sum(1 - |2 h - 1|^b)``, b annealed from 20 to 2 after a warm-up of a fifth, per weight."""
        if self.method.rounding_weight == 0 or step < 0.2 * self.config.iters:
            return 0.0
        fraction = (step / self.config.iters - 0.2) / 0.8
        b = 2 + 18 * (1 - fraction)
        total = sum((1 - (2 * q.soft_rounding() - 1).abs().pow(b)).mean() for _, q, _ in self.weights)
        return self.method.rounding_weight * total

    def _finish(self) -> None:
        self._set_drop(False)
        for _, quantizer, weight in self.weights:
            quantizer.finish_rounding(weight)
            # Sums of gradients are the same bits everywhere; that steps of the optimizer are does not hang on equal hardware.
            self.share.world.agree([quantizer.codes] if quantizer.codes is not None else [])
        for activation in self.activations:
            activation.log_scale.requires_grad_(False)
        self.share.world.agree([a.log_scale for a in self.activations])

    def _mean_loss(self) -> float:
        """Block loss (normalised error of the output) over the first 128 samples, hard roundings."""
        out = self.unit.output
        errors = []
        with torch.no_grad():
            for part in map(self.share.local, self._parts()):
                rows = part.rows
                values: dict[fx.Node, Any] = {n: self.quant_in[n][rows] for n in self.inputs}
                run_nodes(self.program.graph_module, self.closure, values, [out])
                error = (values[out] - self._sampled(rows)[out]).square().mean() / self.energy[out]
                errors.append(part.weight * error)
        return float(torch.stack(self.share.sums(errors)).mean())

    def _parts(self) -> list[Tensor]:
        """Indices of the first 128 samples in slices that the captured batch allows."""
        limit = self.program.signature.max_batch
        fixed = self.program.signature.min_batch == limit
        slices = torch.arange(min(128, self.share.total)).split(limit if fixed else self.streams.chunk)
        return [r for r in slices if not fixed or r.numel() == limit]
