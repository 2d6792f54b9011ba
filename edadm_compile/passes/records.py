"""What passes leave in a graph, as tensors and plain values: layer records and the state of quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from edadm_compile.ir.program import LayerInfo, Program, layer_of
from edadm_compile.passes.checkpoint import Saved
from edadm_compile.quant.fake_quant import ActFakeQuant, WeightFakeQuant


def layer_records(program: Program) -> dict[str, dict[str, Any]]:
    """Layer records by node name."""
    nodes = program.graph_module.graph.nodes
    return {node.name: asdict(info) for node in nodes if (info := layer_of(node)) is not None}


def set_layer_records(program: Program, records: Mapping[str, Any]) -> None:
    """Inverse of `layer_records`, on a program whose nodes have the same names.

    Raises:
        KeyError, TypeError: a record of another program; the program is then unchanged.
    """
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    infos = {nodes[name]: LayerInfo(**{k: _tuple(v) for k, v in record.items()}) for name, record in records.items()}
    for node in nodes.values():
        node.meta.pop("layer", None)
    for node, info in infos.items():
        node.meta["layer"] = info


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def quantizers(program: Program) -> dict[str, ActFakeQuant | WeightFakeQuant]:
    """Quantizer modules by name."""
    modules = program.graph_module.named_modules()
    return {name: m for name, m in modules if isinstance(m, (ActFakeQuant, WeightFakeQuant))}


def ranges_state(program: Program) -> Saved:
    """Scales and zero points of all quantizers, and which are switched on."""
    tensors: dict[str, Tensor] = {}
    found = quantizers(program)
    for name, module in found.items():
        if isinstance(module, ActFakeQuant):
            tensors[f"{name}.log_scale"] = module.log_scale.detach()
            tensors[f"{name}.zero_point"] = module.zero_point
        else:
            tensors[f"{name}.scale"] = module.scale
    return Saved(tensors, {"enabled": {name: module.enabled for name, module in found.items()}})


def set_ranges(program: Program, saved: Saved) -> None:
    """Inverse of `ranges_state`.

    Raises:
        KeyError, ValueError: the state of another program; this one is then unchanged.
    """
    found = quantizers(program)
    enabled = saved.values["enabled"]
    if set(enabled) != set(found):
        raise ValueError("other quantizers than the program has")
    tensors = {name: [saved.tensors[f"{name}.{leaf}"] for leaf in _leaves(module)] for name, module in found.items()}
    for name, module in found.items():
        module.enabled = bool(enabled[name])
        if isinstance(module, ActFakeQuant):
            module.log_scale.data, module.zero_point = tensors[name]
        else:
            module.scale = tensors[name][0]


def _leaves(module: ActFakeQuant | WeightFakeQuant) -> tuple[str, ...]:
    return ("log_scale", "zero_point") if isinstance(module, ActFakeQuant) else ("scale",)


def learned_state(
    program: Program, weights: Iterable[WeightFakeQuant], activations: Iterable[ActFakeQuant]
) -> dict[str, Tensor]:
    """Codes of weights and log scales of activations, by name; quantizers without learned codes are left out."""
    names: dict[Any, str] = {module: name for name, module in quantizers(program).items()}
    codes = {f"{names[q]}.codes": q.codes for q in weights if q.codes is not None}
    return codes | {f"{names[a]}.log_scale": a.log_scale.detach() for a in activations}


def check_learned(program: Program, tensors: Mapping[str, Tensor]) -> None:
    """Whether `set_learned` can install these.

    Raises:
        KeyError, ValueError: the state of another program.
    """
    found = quantizers(program)
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        module = found[name]
        if isinstance(module, ActFakeQuant):
            fits = leaf == "log_scale" and value.dtype == torch.float32 and value.shape == module.log_scale.shape
        else:
            axis, channels = module.spec.axis, module.scale.numel()
            fits = leaf == "codes" and value.dtype == torch.int8 and value.shape[axis or 0] == channels
            fits = fits and bool((value >= module.spec.qmin).all()) and bool((value <= module.spec.qmax).all())
        if not fits:
            raise ValueError(f"{key} does not fit its quantizer")


def set_learned(program: Program, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `learned_state`.

    Raises:
        KeyError, ValueError: the state of another program; this one is then unchanged.
    """
    check_learned(program, tensors)
    found = quantizers(program)
    for key, value in tensors.items():
        module = found[key.rpartition(".")[0]]
        if isinstance(module, ActFakeQuant):
            module.log_scale.data = value
        else:
            module.codes = value
