"""Values that integers or float16 cannot hold well: found while calibrating, reported by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edadm_compile.calibration.diagnosis import where
from edadm_compile.ir.analysis import is_layer
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.passes.base import Context
from edadm_compile.quant.observers import MIN_SCALE

#: Largest float16.
FLOAT16_MAX = 65504.0
#: GPU code stores float32 when calibration comes this close: other noise reaches further than the calibration set.
_NEAR_MAX = FLOAT16_MAX / 2
#: Share of values that round to 0 beyond which a range is reported as ruled by outliers; normal values lose a third at
#: 4 bits.
_LOST_WEIGHTS, _LOST_VALUES = 0.9, 0.75
#: Channels with fewer weights are not judged.
_LEAST_WEIGHTS = 16
_SHOWN = 5


@dataclass
class Peak:
    """Largest magnitude of a value over the calibration set; an observer of `calibrate`."""

    value: float = 0.0

    def update(self, x: Tensor, keep: int, generator: torch.Generator) -> None:
        """Take in one batch; draws nothing. Infinities are masks, which float16 has too: they are left out."""
        if not x.numel():
            return
        low, high = torch.aminmax(x)  # no copy of x, which its absolute values would be
        largest = float(torch.maximum(-low, high))
        if not math.isfinite(largest):
            largest = float(x.abs().nan_to_num(0.0, 0.0, 0.0).max())
        self.value = max(self.value, largest)


def peaks(program: Program) -> dict[fx.Node, Peak]:
    """An observer for each float value that a device may have to store."""
    nodes = program.graph_module.graph.nodes
    return {n: Peak() for n in nodes if n.op == "call_function" and n.meta.get("dtype") == torch.float32}


def beyond_float16(found: Mapping[fx.Node, Peak], ctx: Context) -> dict[str, float | str] | None:
    """Report the first layer whose values do not fit into float16 with room to spare.

    Returns:
        ``where`` that is and the ``largest`` magnitude anywhere, for `driver.device_code`; None when all fit.
    """
    large = [(node, peak.value) for node, peak in found.items() if peak.value > _NEAR_MAX]
    if not large:
        return None
    (node, value), largest = large[0], max(value for _, value in large)
    ctx.warn(
        f"values reach {value:.3g} in {where(node)}, {largest:.3g} anywhere; float16 ends at {FLOAT16_MAX:g}: GPU code for "
        "this file stores float32 between kernels"
    )
    return {"where": where(node), "largest": largest}


def readers(node: fx.Node) -> str:
    """Layers that read a quantizer, for messages."""
    names = [info.name for user in node.users if (info := layer_of(user)) is not None]
    return " and ".join(dict.fromkeys(names)) or node.name


#: A quantizer, a float32 sample [n] of what it reads, and the extremes of all it reads (0 included).
Observed = tuple[fx.Node, Tensor, float, float]


def report_activations(observed: Sequence[Observed], ctx: Context) -> None:
    """Warn of quantized values that are constant, vanishing, or ruled by outliers."""
    wild: list[tuple[float, str, str]] = []
    for node, sample, low, high in observed:
        layers, largest = readers(node), max(-low, high)
        if float(sample.min()) == float(sample.max()) and float(sample[0]) in (low, high, 0.0):
            ctx.warn(f"the input of layer {layers} is always {float(sample[0]):g} on the calibration set")
        elif largest < MIN_SCALE * 128:
            ctx.warn(f"the input of layer {layers} stays within {largest:.3g}, too small for a scale: it becomes 0")
        elif any(is_layer(user) for user in node.users) and (lost := _lost(sample, high - low)) > _LOST_VALUES:
            wild.append((lost, layers, f"from {low:.3g} to {high:.3g}"))
    if wild:
        lost, layers, reach = max(wild)
        ctx.warn(
            f"outliers in the input of layer {_some([name for _, name, _ in wild])}: that of {layers} reaches {reach}, and "
            f"{lost:.0%} of its values are below half an 8-bit step of that; a rule with act_bits = 16 for the layer keeps "
            "them"
        )


def _lost(sample: Tensor, width: float) -> float:
    """Share of the values other than 0 that 8 bits over a range of that width round to 0."""
    magnitudes = sample[sample != 0].abs()
    return float((magnitudes < width / 255 / 2).float().mean()) if magnitudes.numel() else 0.0


def report_weights(weights: Sequence[tuple[str, Tensor, Tensor]], ctx: Context) -> None:
    """Warn of weights that are zero, or so uneven that rounding leaves one of a channel.

    Args:
        weights: layer name, float32 [channels, n], scale [channels].
    """
    zero, pruned, wild = [], [], []
    for name, rows, scale in weights:
        used = rows != 0
        dead = int((~used.any(dim=1)).sum())
        if float(rows.abs().max()) < MIN_SCALE / 2:
            zero.append(name)
        elif dead:
            pruned.append(f"{name} ({dead} of {rows.shape[0]})")
        if name in zero:
            continue
        lost = (used & (rows.abs() < scale[:, None] / 2)).sum(dim=1) / used.sum(dim=1).clamp(min=1)
        channels = int(((lost > _LOST_WEIGHTS) & (used.sum(dim=1) >= _LEAST_WEIGHTS)).sum())
        if channels:
            wild.append(f"{name} ({channels} of {rows.shape[0]})")
    if zero:
        ctx.warn(
            f"all weights are 0, or too small for a scale, in layer {_some(zero)}: untrained, or a broken checkpoint?"
        )
    if pruned:
        ctx.warn(f"output channels with no weight but 0 in layer {_some(pruned)}")
    if wild:
        ctx.warn(
            f"outliers among the weights: more than {_LOST_WEIGHTS:.0%} of an output channel round to 0 in layer "
            f"{_some(wild)}; a rule with weight_bits = 8, or 32 for float, keeps more"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
