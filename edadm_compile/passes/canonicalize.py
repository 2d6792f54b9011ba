"""Bring the many spellings of one operation to one, so that later passes match a single form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.ir.analysis import constant_target, dependencies, propagate_shapes
from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import Program, get_constant, set_constant
from edadm_compile.passes import linear_forms, rewrites
from edadm_compile.passes.base import Context, PassResult, finish
from edadm_compile.passes.trace import check_ops

aten = torch.ops.aten

_ASSERTS = ("_assert", "sym_constrain", "_guards_fn")
_IDENTITIES = {
    "aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default",
    "aten.lift_fresh_copy.default", "aten.dropout.default",
}  # fmt: skip
#: Operators whose second operand may be a weight.
_WEIGHTED = {
    *LAYER_OPS,
    "aten.conv1d.default",
    "aten.conv_transpose1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.matmul.default",
}
_CASTS = {"aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.type_as.default"}


@dataclass(frozen=True)
class Canonicalize:
    """Float graph to canonical float graph.

    1. sub-graph call (grad mode, checkpoint) → its body inlined
    2. assertions and guards → nothing
    3. view, _unsafe_view → reshape; sizes that are the batch → -1 or the batch of x
    4. clone, contiguous, alias, detach, dropout in eval mode, casts to the same type → their input
    5. operators of constants only → a constant
    6. conv1d, convolution, conv2d(padding="same") → conv2d; conv_transpose1d → conv_transpose2d
    7. addmm, mm, matmul, einsum with a constant matrix on either side → linear
    8. batch_norm after a convolution → scaled weight and bias
    9. x * sigmoid(x) → silu
    10. a weight that several layers read → one constant and one name for each
    """

    name: str = "canonicalize"
    reads: str = "float"
    writes: str = "float"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Apply the rules in order until the structural ones find nothing more."""
        graph = program.graph_module.graph
        before = len(graph.nodes)
        counts = {"inlined": rewrites.inline_subgraphs(program)}
        counts["asserts"] = _drop_asserts(graph)
        _normalise_sizes(program)
        finish(program)
        propagate_shapes(program)
        counts["identities"] = _drop_identities(graph)
        counts["constants"] = _fold_constants(program)
        finish(program)
        propagate_shapes(program)
        counts["convolutions"] = rewrites.unify_convolutions(program)
        finish(program)
        propagate_shapes(program)
        counts["linears"] = linear_forms.unify_linears(program)
        counts["batch_norms"] = rewrites.fold_batch_norm(program)
        counts["swish"] = rewrites.match_swish(graph)
        _fold_constants(program)
        counts["separated"] = linear_forms.separate_layers(program)
        finish(program)
        check_ops(program)
        propagate_shapes(program)
        return PassResult(program, len(graph.nodes) != before, counts)


def _drop_asserts(graph: fx.Graph) -> int:
    dead = [n for n in graph.nodes if n.op == "call_function" and any(a in op_name(n.target) for a in _ASSERTS)]
    for node in dead:
        graph.erase_node(node)
    return len(dead)


def _normalise_sizes(program: Program) -> None:
    """Rule 3. Exported symbolic sizes all derive from the batch; only the batch of x is kept as a number."""
    graph = program.graph_module.graph
    x = next(n for n in graph.nodes if n.op == "placeholder")
    batch = str(x.meta["val"].shape[0]) if isinstance(x.meta.get("val"), Tensor) else ""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = op_name(node.target)
        if name in ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"):
            sizes = node.args[1]
            symbolic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
            if len(symbolic) == 1 and -1 not in sizes:
                sizes = [-1 if i == symbolic[0] else size for i, size in enumerate(sizes)]
            node.target, node.args = aten.reshape.default, (node.args[0], list(sizes))
        elif name == "aten.sym_size.int" and node.args[0] is not x and str(node.meta.get("val")) == batch:
            node.args = (x, 0)


def _drop_identities(graph: fx.Graph) -> int:
    count = 0
    for node in list(graph.nodes):
        name = op_name(node.target) if node.op == "call_function" else ""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        same_type = node.meta.get("dtype") is not None and node.meta.get("dtype") == source.meta.get("dtype")
        same_shape = node.meta.get("shape") == source.meta.get("shape")
        inert_dropout = name != "aten.dropout.default" or node.args[2] is False
        if (
            (name in _IDENTITIES and inert_dropout)
            or (name in _CASTS and same_type)
            or (name == "aten.expand.default" and same_shape and same_type)
        ):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            count += 1
    return count


def _fold_constants(program: Program) -> int:
    """Rule 5: evaluate nodes that depend on no input, and keep the frontier as constants.

    The new constant takes the name of the only constant it came from plus ``_folded``, so that a layer whose
    weight is computed from a parameter (weight standardisation, a transpose) keeps its name.
    """
    graph = program.graph_module.graph
    deps = dependencies(graph)
    values: dict[fx.Node, Any] = {}
    count = 0
    for node in list(graph.nodes):
        if deps[node] or node.op == "output" or _is_random(node):
            continue
        if node.op == "get_attr":
            values[node] = get_constant(program.graph_module, str(node.target))
            continue
        if any(source not in values for source in node.all_input_nodes):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        if (
            node.op != "get_attr"
            and isinstance(value, Tensor)
            and any(deps[user] or user.op == "output" for user in node.users)
        ):
            _install(program, node, value)
            count += 1
    return count


def _is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers: one draw must not become a constant (`check_ops` refuses it)."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _install(program: Program, node: fx.Node, value: Tensor) -> None:
    graph = program.graph_module.graph
    name = rewrites.fresh_name(graph, _derived_name(program, node, value))
    set_constant(program.graph_module, name, value.contiguous())
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)


def _derived_name(program: Program, node: fx.Node, value: Tensor) -> str:
    """Name for a computed constant: after its only origin, else after the weight or the module that its origins belong to."""
    origins = sorted(t for t in set(map(constant_target, _ancestors(node))) if t)
    if len(origins) == 1:
        return f"{origins[0]}_folded"
    common: list[str] = []
    for column in zip(*(o.split(".") for o in origins), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    if common[-2:] == ["parametrizations", "weight"]:
        return ".".join([*common[:-2], "weight_folded"])
    # A low-rank update of a frozen weight keeps that weight's name.
    alike = [o for o in origins if o.endswith(".weight") and get_constant(program.graph_module, o).shape == value.shape]
    if len(alike) == 1:
        return f"{alike[0]}_folded"
    readers = [u for u in node.users if op_name(u.target) in _WEIGHTED and u.args[1] is node]
    owner = ".".join(common) or next((s[-1] for u in readers if (s := u.meta.get("scope", ()))), "")
    return f"{owner}.weight_folded" if owner and readers else f"constants.{node.name}"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen
