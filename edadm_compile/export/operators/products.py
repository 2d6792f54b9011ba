"""Matrix products and attention."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.norms import vector_norm
from edadm_compile.export.operators.operands import cast, fixed, transpose, wide
from edadm_compile.export.operators.reductions import reduced
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _matmul(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    work = wide(dtype)
    a, b = (s.value(x, work) for x in node.args[:2])
    return cast(s, s.op("MatMul", a, b, name=node.name), work, dtype)


def _added_product(s: Scope, node: fx.Node) -> Emitted:
    """``beta * input + alpha * (a @ b)``; with beta 0 the input does not count, not even its NaN."""
    dtype = s.dtype(node)
    work = wide(dtype)
    beta, alpha = (argument(node, i, n, 1) for i, n in ((3, "beta"), (4, "alpha")))
    start, a, b = (s.value(x, work) for x in node.args[:3])
    result = s.op("MatMul", a, b, name=node.name)
    if alpha != 1:
        result = s.op("Mul", result, s.value(alpha, work))
    if beta != 0:
        start = start if beta == 1 else s.op("Mul", start, s.value(beta, work))
        result = s.op("Add", result, start)
    return cast(s, result, work, dtype)


def _einsum(s: Scope, node: fx.Node) -> Emitted:
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    values = [s.value(t, s.dtype(node)) for t in tensors]  # type: ignore[union-attr]
    return s.op("Einsum", *values, equation=equation, name=node.name)


def _outer(s: Scope, node: fx.Node) -> Emitted:
    dtype = s.dtype(node)
    work = wide(dtype)
    column, row = (s.value(x, work) for x in node.args[:2])
    product = s.op("Mul", s.op("Unsqueeze", column, s.const([1])), row, name=node.name)
    return cast(s, product, work, dtype)


def _linear(s: Scope, node: fx.Node) -> Emitted:
    """MatMul with the transposed weight, a constant already transposed in the file."""
    weight, bias, dtype = node.args[1], argument(node, 2, "bias"), s.dtype(node)
    constant = s.constant_of(weight)
    if constant is not None and constant.dim() == 2:
        right = s.builder.constant(constant.T.to(dtype), name=f"{weight.target}.T")  # type: ignore[union-attr]
    else:
        right = s.value(weight, dtype)
        right = transpose(s, right, [1, 0]) if s.rank(weight) == 2 else right  # type: ignore[arg-type]
    product = s.op("MatMul", s.value(node.args[0], dtype), right, name=node.name)
    return product if bias is None else s.op("Add", product, s.value(bias, dtype))


def _bilinear(s: Scope, node: fx.Node) -> Emitted:
    """``sum over i, j of x1[..., i] W[o, i, j] x2[..., j]``."""
    first, second, weight = (s.value(x) for x in node.args[:3])
    result = s.op("Einsum", first, weight, second, equation="...i,oij,...j->...o", name=node.name)
    bias = argument(node, 3, "bias")
    return result if bias is None else s.op("Add", result, s.value(bias))


def _attention(s: Scope, node: fx.Node) -> Emitted:
    """``softmax(q k^T * scale + mask) v``."""
    query, key, value = node.args[:3]
    if argument(node, 4, "dropout_p", 0.0):
        raise ExportError("scaled_dot_product_attention: dropout_p > 0 is random and has no ONNX form")
    if node.kwargs.get("enable_gqa"):
        raise ExportError("scaled_dot_product_attention: enable_gqa=True has no ONNX form here")
    dtype, rank = s.dtype(node), s.rank(key)  # type: ignore[arg-type]
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(fixed(s.dims(query)[-1], "attention: the size of a head"))  # type: ignore[arg-type]
    turned = transpose(s, s.value(key), [*range(rank - 2), rank - 1, rank - 2])
    scores = s.op("Mul", s.op("MatMul", s.value(query), turned), s.value(scale, dtype))
    mask, may_be_empty = _mask(s, node, dtype)
    if mask is not None:
        scores = s.op("Add", scores, mask)
    weights = s.op("Softmax", scores, axis=-1)
    if may_be_empty:  # a query that may look at nothing gets zeros
        nothing = s.op("Equal", reduced(s, "ReduceMax", scores, [-1], True), s.value(-math.inf, dtype))
        weights = s.op("Where", nothing, s.value(0.0, dtype), weights)
    return s.op("MatMul", weights, s.value(value), name=node.name)


def _mask(s: Scope, node: fx.Node, dtype: torch.dtype) -> tuple[ir.Value | None, bool]:
    """(what is added to the scores, whether a whole row of it may be -inf)."""
    given = argument(node, 3, "attn_mask")
    if argument(node, 5, "is_causal", False):
        sizes = (s.dims(node.args[i])[-2] for i in (0, 1))  # type: ignore[arg-type]
        rows, columns = (fixed(d, "attention: the length of a causal sequence") for d in sizes)
        allowed = torch.ones(rows, columns, dtype=torch.bool).tril()
        return s.const(_penalty(allowed), dtype), False
    if given is None:
        return None, False
    constant = s.constant_of(given)
    if constant is not None:
        added = _penalty(constant) if constant.dtype == torch.bool else constant
        return s.const(added, dtype), bool(added.isneginf().all(dim=-1).any())
    if s.dtype(given) != torch.bool:
        return s.value(given, dtype), True
    limits = (s.value(v, dtype) for v in (0.0, -math.inf))
    return s.op("Where", s.value(given), *limits), True


def _penalty(allowed: torch.Tensor) -> torch.Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


def _cdist(s: Scope, node: fx.Node) -> Emitted:
    """Norms of all differences; torch may take the longer way over a matrix product, which rounds more."""
    order, dtype = float(argument(node, 2, "p", 2.0)), s.dtype(node)
    a, b = (s.op("Unsqueeze", s.value(x, dtype), s.const([d])) for x, d in zip(node.args[:2], (-2, -3), strict=True))
    return vector_norm(s, s.op("Sub", a, b), order, [-1], False, dtype, name=node.name)


TABLE: dict[str, Emitter] = {
    **{f"aten.{name}.default": _matmul for name in ("mm", "bmm", "matmul")},
    "aten.addmm.default": _added_product,
    "aten.baddbmm.default": _added_product,
    "aten.einsum.default": _einsum,
    "aten.outer.default": _outer,
    "aten.linear.default": _linear,
    "aten.bilinear.default": _bilinear,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.cdist.default": _cdist,
}
