"""Layers that a plan runs in the store type because that was measured faster (do no harm).

qconv2d(quantize(x), w_q, m, b') → conv2d(x, w, b) with w = w_q * m / s and b = b' + m * z * sum(w_q): the weights keep
their codes, the activations are no longer rounded. The same for qlinear.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from edadm_compile.errors import InputError
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, layer_of, layers, set_constant
from edadm_compile.kernels.launch import ConstantSpec

_CONV, _LINEAR = "edadm.qconv2d.default", "edadm.qlinear.default"


def apply(program: Program, names: Sequence[str]) -> dict[str, ConstantSpec]:
    """Rewrite the named layers of a private copy in place.

    Returns:
        how the device makes the new constants, by name; the graph only holds their shapes.

    Raises:
        InputError: a name that is no integer layer of the program.
    """
    wanted = set(names)
    unknown = wanted - {info.name for info in layers(program) if info.executed != "float" and info.weight_shape}
    if unknown:
        raise InputError(f"layers to leave in float: {sorted(unknown)[0]!r} is no integer layer of this program")
    made: dict[str, ConstantSpec] = {}
    for node in list(program.graph_module.graph.nodes):
        info = layer_of(node)
        if info is not None and info.name in wanted and op_name(node.target) in (_CONV, _LINEAR):
            _rewrite(program, node, made)
    program.graph_module.graph.eliminate_dead_code()
    return made


def _rewrite(program: Program, node: fx.Node, made: dict[str, ConstantSpec]) -> None:
    codes, graph = node.args[0], node.graph
    assert isinstance(codes, fx.Node)
    conv = op_name(node.target) == _CONV
    bits, shape = (node.args[9], node.args[10]) if conv else (node.args[4], node.args[5])
    w_q, multiplier, bias = (str(a.target) for a in node.args[1:4])  # type: ignore[union-attr]
    scale, zero = (str(a.target) for a in codes.args[1:3])  # type: ignore[union-attr]
    settings = {"bits": bits, "shape": list(shape)}  # type: ignore[arg-type]
    sizes = {"weight": tuple(shape), "bias": tuple(shape[:1])}  # type: ignore
    sources = {"weight": (w_q, multiplier, scale), "bias": (w_q, multiplier, bias, zero)}
    constants = []
    for part in ("weight", "bias"):
        name = f"left_float.{w_q.replace('.', '_')}_{part}"
        made[name] = ConstantSpec(sources[part], f"float_{part}", settings)
        set_constant(program.graph_module, name, torch.empty(sizes[part], device="meta"))
        with graph.inserting_before(node):
            constants.append(graph.get_attr(name))
    x = codes.args[0]
    if conv:
        node.args = (x, *constants, node.args[5], node.args[6], node.args[7], node.args[8])
        node.target = torch.ops.aten.conv2d.default
    else:
        node.args = (x, *constants)
        node.target = torch.ops.aten.linear.default
