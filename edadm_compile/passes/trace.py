"""From an exported program to a float program.

Not a `Pass` (its input is not a program); `pipeline` calls it first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edadm_compile.errors import CaptureError
from edadm_compile.ir.dialects import illegal_ops
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Program, SamplerSpec, Signature
from edadm_compile.passes.capture import CallAdapter


def trace(
    exported: ExportedProgram,
    signature: Signature,
    sampler: SamplerSpec,
    model: nn.Module | None = None,
    fixed: dict[str, Any] | None = None,
) -> Program:
    """Turn an exported program into a float program with plain inputs and one tensor output.

    Args:
        exported: from `export_module` or the user's ``.pt2`` file.
        model: the eager source, to check that no parameter escaped the graph.
        fixed: keyword arguments the model is called with besides its inputs.

    Raises:
        CaptureError: a parameter is hidden from the graph.
    """
    with torch.no_grad():
        functional = exported.run_decompositions({})  # an empty table: functionalise, decompose nothing
    module = functional.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _plain_calling_convention(module, signature)
    _strip_adapter(module)
    program = Program(module, "float", signature, sampler)
    if signature.min_batch == signature.max_batch:
        program = program.with_note(
            f"captured for a batch of {signature.max_batch} only: others are run in slices of it, the last one filled up"
        )
    if model is not None:
        unused = check_coverage(
            module, CallAdapter(model, [spec.name for spec in signature.conditions], fixed), signature
        )
        if unused:
            program = program.with_note(
                f"not part of the program, the output does not depend on it: {', '.join(unused)}"
            )
    return program


def _plain_calling_convention(module: fx.GraphModule, signature: Signature) -> None:
    """Drop pytree handling and guards, name the inputs after the signature, return one tensor."""
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != len(signature.inputs):
        raise CaptureError(
            f"the captured graph has {len(inputs)} inputs ({', '.join(n.name for n in inputs)}), "
            f"expected {len(signature.inputs)} ({', '.join(s.name for s in signature.inputs)})"
        )
    for node, spec in zip(inputs, signature.inputs, strict=True):
        node.target = spec.name
        node.args = ()
    output = graph.output_node()
    value = output.args[0]
    while isinstance(value, (tuple, list)):
        value = value[0]
    output.args = (value,)


def _strip_adapter(module: fx.GraphModule) -> None:
    """Undo the ``model.`` prefix of `CallAdapter`, and record each node's module path as plain strings."""
    prefix = "model."
    targets = [str(n.target) for n in module.graph.nodes if n.op == "get_attr"]
    wrapped = (
        bool(targets)
        and isinstance(getattr(module, "model", None), nn.Module)
        and all(t.startswith(prefix) or "." not in t for t in targets)
    )
    for node in module.graph.nodes:
        if wrapped and node.op == "get_attr" and str(node.target).startswith(prefix):
            node.target = str(node.target)[len(prefix):]  # fmt: skip
        stack = node.meta.get("nn_module_stack") or {}
        paths = [str(entry[0]) for entry in stack.values()]
        if wrapped:
            paths = [p.removeprefix("model").removeprefix(".") for p in paths]
        node.meta = {"scope": tuple(p for p in paths if p), "val": node.meta.get("val")}
    if wrapped:
        inner = module.model
        assert isinstance(inner, nn.Module)
        for name, child in list(inner._modules.items()):
            module._modules[name] = child
        module._parameters.update(inner._parameters)
        module._buffers.update(inner._buffers)
        for name, value in vars(inner).items():  # tensors written in forward (torch.tensor([...])) are plain attributes
            if isinstance(value, Tensor):
                module.register_buffer(name, value)


def check_coverage(module: fx.GraphModule, adapter: CallAdapter, signature: Signature) -> list[str]:
    """Refuse a graph that misses a parameter on which the eager model's output depends.

    Parameters that no node reads are set to NaN, one call each: a prediction that stays finite does not depend on them.

    Returns:
        modules of which no parameter is read (left over in the checkpoint, or computed for nothing).

    Raises:
        CaptureError: naming the modules whose parameters are hidden.
    """
    parameters = dict(adapter.model.named_parameters(remove_duplicate=False))
    read = {
        id(p)
        for n in _all_nodes(module)
        if n.op == "get_attr" and n.users and (p := parameters.get(str(n.target))) is not None
    }
    unread = {name: p for name, p in parameters.items() if id(p) not in read}
    if not unread:
        return []
    hidden = _influential(adapter, unread, signature)
    if hidden:
        owners = sorted({name.rpartition(".")[0] or name for name in hidden})
        raise CaptureError(
            f"{len(owners)} layer(s) of the model are hidden from the captured graph although its output depends on them: {', '.join(owners[:5])}. "
            "A checkpoint wrapper, a custom operator or a cached result usually hides them: disable it "
            "(use_checkpoint=False), or export under torch.no_grad()"
        )
    used = {name.rpartition(".")[0] for name in parameters if name not in unread}
    return sorted({owner for name in unread if (owner := name.rpartition(".")[0]) not in used})


def _influential(adapter: CallAdapter, names: Iterable[str], signature: Signature) -> list[str]:
    """Those of the named parameters that reach the prediction; nothing is changed in place."""
    parameters = dict(adapter.model.named_parameters(remove_duplicate=False))
    inputs = tuple(torch.zeros((signature.min_batch, *spec.shape), dtype=spec.dtype) for spec in signature.inputs)

    def reaches(poisoned: list[str]) -> bool:
        values = {f"model.{name}": torch.full_like(parameters[name], float("nan")) for name in poisoned}
        with torch.no_grad():
            return bool(torch.func.functional_call(adapter, values, inputs).isnan().any())

    floating = [name for name in names if parameters[name].is_floating_point()]
    return [name for name in floating if reaches([name])] if floating and reaches(floating) else []


def _all_nodes(module: fx.GraphModule) -> list[fx.Node]:
    nodes = list(module.graph.nodes)
    for child in module.children():
        if isinstance(child, fx.GraphModule):
            nodes += _all_nodes(child)
    return nodes


def check_ops(program: Program) -> None:
    """Refuse operators outside the closed table, after canonicalization has removed what it can.

    Raises:
        CaptureError: naming the operators and where they come from in the source model.
    """
    names = illegal_ops(program.graph_module.graph, "float")
    if names:
        places = [f"{name} (in {_place(program, name)})" for name in names]
        training = any(
            name.startswith(("aten.native_dropout", "aten._native_batch_norm_legit_functional")) for name in names
        )
        hint = "The model was exported in training mode: call model.eval() before torch.export.export" if training else (
            "The table is edadm_compile/ir/ops.py; rewrite the model without them or add a pure ATen operator there"
        )  # fmt: skip
        raise CaptureError(f"operator(s) outside the supported table: {', '.join(places[:5])}. {hint}")


def _place(program: Program, name: str) -> str:
    """Module path of the first node that calls an operator."""
    node = next(n for n in program.graph_module.graph.nodes if n.op == "call_function" and op_name(n.target) == name)
    return (node.meta.get("scope") or ("the top level",))[-1]
