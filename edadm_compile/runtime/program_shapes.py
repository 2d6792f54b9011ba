"""Shapes of a program of unknown origin, computed on tensors without memory and held to limits node by node."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import Program, get_constant, placeholders
from edadm_compile.runtime.limits import Limits
from edadm_compile.runtime.shape_rules import shape_rule

_META = torch.device("meta")
#: Operators that return a list of pieces of their first argument.
_LISTS = ("aten.unbind.int", "aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default")
_MOST_PIECES = 4096
#: Integers of a graph are sizes; arithmetic beyond this cannot be one.
_LARGEST_INTEGER = 1 << 62
_CODES = (torch.int8, torch.int16)
_CONV, _TRANSPOSED, _ATTENTION = ("edadm.qconv2d.default", "edadm.qconv_transpose2d.default",
                                  "aten.scaled_dot_product_attention.default")  # fmt: skip


def place(index: int, node: fx.Node) -> str:
    """How messages name a node."""
    return f"program node {index} ({op_name(node.target) if node.op == 'call_function' else node.target})"


def propagate(program: Program, batch: int, limits: Limits) -> None:
    """Run the program on meta tensors at one batch size.

    Raises:
        ArtifactError: a node that does not accept its arguments, or asks for more than `limits`.
    """
    inputs = [torch.empty((batch, *s.shape), dtype=s.dtype, device=_META) for s in program.signature.inputs]
    if program.time is not None:
        names = placeholders(program.graph_module.graph)[len(inputs):]  # fmt: skip
        tables = program.time.tables
        inputs += [torch.empty((batch, *tables[name].shape[1:]), device=_META) for name in names]
    result = run_meta(program.graph_module, inputs, limits, max(1, batch // program.signature.min_batch))
    if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != batch:
        raise ArtifactError(f"program: its output is no tensor of {batch} rows")
    if not result.dtype.is_floating_point:
        raise ArtifactError(f"program: its output is {result.dtype}, expected a floating type")


def run_meta(module: fx.GraphModule, inputs: list[Tensor], limits: Limits, factor: int = 1) -> Any:
    """The result of a graph on meta tensors.

    Args:
        factor: how many times `limits.value` a value may take (larger batches take more).

    Raises:
        ArtifactError: as `propagate`.
    """
    values: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    allowed = limits.value * factor
    with torch.no_grad():
        for index, node in enumerate(module.graph.nodes):
            try:
                values[node] = _value(module, node, values, arguments, allowed)
            except ArtifactError as error:
                raise ArtifactError(f"{place(index, node)}: {error}") from None
            except Exception as error:  # a kernel's refusal may be of any type
                reason = (str(error).splitlines() or [""])[0][:200]
                raise ArtifactError(f"{place(index, node)} cannot run: {type(error).__name__}: {reason}") from error
            if node.op == "output":
                return values[node]
    raise ArtifactError("program: it has no output")


def _value(
    module: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any], inputs: Iterator[Tensor], allowed: int
) -> Any:
    if node.op == "placeholder":
        return next(inputs)
    if node.op == "get_attr":
        return get_constant(module, str(node.target)).to(_META)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    if node.op == "output":
        return args[0]
    name = op_name(node.target)
    _check_arguments(name, args, kwargs)
    extra = {"device": _META} if _creates(node.target, args) else {}
    result: Any = shape_rule(name, args, {**kwargs, **extra})
    if result is None:
        result = node.target(*args, **kwargs, **extra)  # type: ignore[operator]
    _check_result(result, allowed)
    _check_workspace(name, args, result, allowed)
    return result


def _creates(target: Any, args: Any) -> bool:
    """Whether an operator makes a tensor of numbers alone: it is told not to take memory."""
    schema = getattr(target, "_schema", None)
    if schema is None or any(isinstance(a, Tensor) for a in args):
        return False
    return any(argument.name == "device" for argument in schema.arguments)


def _check_arguments(name: str, args: Any, kwargs: Any) -> None:
    """Refuse what would do work before its result can be looked at."""
    if name.startswith("operator.") and name != "operator.getitem":
        if kwargs or not all(isinstance(a, (int, float, Tensor)) for a in args):
            raise ArtifactError("arithmetic on something that is no number")
    elif name in _LISTS and _pieces(name, args) > _MOST_PIECES:
        raise ArtifactError(f"more than {_MOST_PIECES} pieces")
    elif name.startswith("edadm.") and not name.startswith(("edadm.quantize", "edadm.dequantize_weight")):
        codes = args[:2] if name == "edadm.qmatmul.default" else args[:1]
        if not all(isinstance(a, Tensor) and a.dtype in _CODES for a in codes):
            raise ArtifactError("reads values that are no codes")
    elif name == "edadm.quantize.default" and not args[0].dtype.is_floating_point:
        raise ArtifactError(f"quantizes {args[0].dtype}, expected a floating type")


def _pieces(name: str, args: Any) -> int:
    if name == "aten.split_with_sizes.default":
        return len(args[1])
    if name == "aten.chunk.default":
        return int(args[1])
    dim = args[1] if name == "aten.unbind.int" and len(args) > 1 else args[2] if len(args) > 2 else 0
    size = args[0].shape[dim]
    return int(size if name == "aten.unbind.int" else -(-size // max(1, int(args[1]))))


def _check_result(result: Any, allowed: int) -> None:
    for value in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(value, Tensor):
            taken = value.numel() * value.element_size()
            if taken > allowed:
                raise ArtifactError(f"a value of {taken} bytes, allowed {allowed}")
            if value.device != _META:
                raise ArtifactError("a value that does not depend on sizes alone")
        elif isinstance(value, (int, float)) and abs(value) > _LARGEST_INTEGER:
            raise ArtifactError("a number beyond any size")


def _check_workspace(name: str, args: Any, result: Any, allowed: int) -> None:
    """Memory that a kernel takes beside its result: padded or spread inputs, columns of a convolution, scores."""
    taken = 0
    if name in (_CONV, _TRANSPOSED):
        taken = _integer_convolution(name, args, result)
    elif name in LAYER_OPS and result.dim() == 4 and isinstance(args[1], Tensor):
        taken = 4 * result.shape[0] * math.prod(result.shape[2:]) * math.prod(args[1].shape[1:])
    elif name == _ATTENTION:
        taken = 4 * math.prod(args[0].shape[:-1]) * args[1].shape[-2]
    if taken > allowed:
        raise ArtifactError(f"a workspace of {taken} bytes, allowed {allowed}")


def _integer_convolution(name: str, args: Any, result: Tensor) -> int:
    x, shape, stride, padding = args[0], args[-1], args[5], args[6]
    sizes = [int(n) for n in x.shape[2:]]
    if name == _TRANSPOSED:
        dilation = args[8]
        sizes = [
            (n - 1) * s + 1 + 2 * d * (k - 1) for n, s, d, k in zip(sizes, stride, dilation, shape[2:], strict=True)
        ]
    else:
        sides = padding if len(padding) == 4 else [padding[0], padding[0], padding[1], padding[1]]
        sizes = [sizes[0] + sides[0] + sides[1], sizes[1] + sides[2] + sides[3]]
    padded = int(x.shape[0] * x.shape[1]) * math.prod(sizes)
    columns = result.shape[0] * math.prod(result.shape[2:]) * math.prod(shape[1:]) * args[-3]
    return int(max(padded, columns))
