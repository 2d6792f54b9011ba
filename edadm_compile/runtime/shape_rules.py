"""Shapes of common operators without torch's own shape functions.

The first of those that a process calls on tensors without memory imports torch's compiler front end, which takes about a
second: more than everything else that reading a file does. The rules here answer for nearly every node; for what they do
not know, invalid arguments among it, they give None and torch is asked. `tests/runtime/test_shape_rules.py` compares
them with torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rule = Callable[..., Tensor | None]
_LARGEST = 1024.0
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def shape_rule(name: str, args: Sequence[Any], kwargs: Any) -> Tensor | None:
    """The result of an operator on meta tensors, a new meta tensor; None where no rule fits.

    Args:
        name: as `ops.op_name` gives it.
    """
    rule = _RULES.get(name)
    return None if rule is None or kwargs else rule(*args)


def _floats(*values: Any) -> bool:
    """Tensors of one floating type, with elements."""
    first = values[0]
    if not isinstance(first, Tensor) or first.dtype not in _FLOATS:
        return False
    return all(isinstance(v, Tensor) and v.dtype is first.dtype and v.numel() > 0 for v in values)


def _contiguous(value: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=value.dtype, device="meta")


def _in_order(value: Tensor) -> Tensor | None:
    """A new tensor of the shape of `value` with its dimensions in the same order in memory, without gaps.

    What an elementwise kernel makes (torch's TensorIterator); None where dimensions overlap.
    """
    sizes, strides = value.shape, value.stride()
    wide = [d for d in range(value.dim()) if sizes[d] > 1]
    if 0 in sizes or len({strides[d] for d in wide}) != len(wide) or any(strides[d] == 0 for d in wide):
        return None
    made, step = [value.numel()] * value.dim(), 1
    for d in sorted(wide, key=lambda d: strides[d]):
        made[d], step = step, step * sizes[d]
    return torch.empty_strided(tuple(sizes), made, dtype=value.dtype, device="meta")


def _binary(*args: Any) -> Tensor | None:
    if len(args) != 2 or not isinstance(args[0], Tensor):
        return None
    a, b = args
    if type(b) in (int, float):
        return _in_order(a) if _floats(a) else None
    if not _floats(a, b) or a.dim() != b.dim():
        return None
    if all(n in (1, m) for m, n in zip(a.shape, b.shape, strict=True)):
        return _in_order(a)  # the first operand decides on the order where all of its dimensions are there
    both = all(m == n or 1 in (m, n) for m, n in zip(a.shape, b.shape, strict=True))
    if not both or not a.is_contiguous() or not b.is_contiguous():
        return None
    return _contiguous(a, [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)])


def _arithmetic(*args: Any) -> Tensor | None:
    whole = len(args) == 2 and all(isinstance(v, Tensor) and v.dtype is torch.int64 for v in args)
    if whole and args[0].shape == args[1].shape and all(v.is_contiguous() for v in args):
        return _contiguous(args[0], args[0].shape)
    return _binary(*args)


def _group_norm(x: Any = None, groups: Any = None, *rest: Any) -> Tensor | None:
    if len(rest) > 4 or not _floats(x) or type(groups) is not int or groups < 1 or x.dim() < 2 or x.shape[1] % groups:
        return None
    fits = all(v is None or (_floats(x, v) and v.shape == (x.shape[1],)) for v in rest[:2])
    return _contiguous(x, x.shape) if fits else None


def _layer_norm(x: Any = None, shape: Any = None, *rest: Any) -> Tensor | None:
    if len(rest) > 4 or not _floats(x) or not isinstance(shape, (list, tuple)) or not 1 <= len(shape) <= x.dim():
        return None
    last = tuple(shape)
    fits = all(v is None or (_floats(x, v) and tuple(v.shape) == last) for v in rest[:2])
    return _contiguous(x, x.shape) if fits and tuple(x.shape[x.dim() - len(last) :]) == last else None


def _cat(values: Any = None, dim: Any = 0) -> Tensor | None:
    if not isinstance(values, (list, tuple)) or not values or not _floats(*values) or type(dim) is not int:
        return None
    rank = values[0].dim()
    if rank < 2 or not -rank <= dim < rank or any(v.dim() != rank for v in values):
        return None
    dim %= rank
    if len({(*v.shape[:dim], *v.shape[dim + 1 :]) for v in values}) != 1:
        return None
    shape = list(values[0].shape)
    shape[dim] = sum(v.shape[dim] for v in values)
    last = rank == 4 and all(v.is_contiguous(memory_format=torch.channels_last) for v in values)
    if not last or any(v.is_contiguous() for v in values):
        return _contiguous(values[0], shape)
    return torch.empty(shape, dtype=values[0].dtype, device="meta", memory_format=torch.channels_last)


def _attention(*args: Any) -> Tensor | None:
    if len(args) != 3 or not _floats(*args) or any(v.dim() != 4 for v in args):
        return None
    q, k, v = args
    fits = q.shape[:2] == k.shape[:2] == v.shape[:2] and q.shape[3] == k.shape[3] and k.shape[2] == v.shape[2]
    return _contiguous(q, (*q.shape[:3], v.shape[3])) if fits else None


def _convolution(x: Any = None, weight: Any = None, bias: Any = None, *rest: Any) -> Tensor | None:
    if not _floats(x, weight) or x.dim() != 4 or weight.dim() != 4 or not all(v.is_contiguous() for v in (x, weight)):
        return None
    stride, padding, dilation, groups = (*rest, *(([1, 1], [0, 0], [1, 1], 1)[len(rest) :]))[:4]
    pairs = all(
        isinstance(v, (list, tuple)) and len(v) == 2 and all(type(n) is int for n in v)
        for v in (stride, padding, dilation)
    )
    if len(rest) > 4 or not pairs or type(groups) is not int or min(*stride, *dilation, groups) < 1 or min(padding) < 0:
        return None
    fits = bias is None or (_floats(x, bias) and bias.shape == weight.shape[:1])
    if not fits or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return _contiguous(x, (x.shape[0], weight.shape[0], *sizes)) if min(sizes) > 0 else None


def _linear(*args: Any) -> Tensor | None:
    if len(args) not in (2, 3) or not _floats(*args[:2]) or args[0].dim() < 2 or args[1].dim() != 2:
        return None
    x, weight, bias = (*args, None)[:3]
    fits = bias is None or (_floats(x, bias) and bias.shape == weight.shape[:1])
    if not fits or x.shape[-1] != weight.shape[1] or not x.is_contiguous():
        return None
    return _contiguous(x, (*x.shape[:-1], weight.shape[0]))


def _embedding(weight: Any = None, rows: Any = None, *rest: Any) -> Tensor | None:
    if (
        rest
        or not _floats(weight)
        or weight.dim() != 2
        or not isinstance(rows, Tensor)
        or rows.dtype is not torch.int64
    ):
        return None
    return _contiguous(weight, (*rows.shape, weight.shape[1])) if rows.numel() > 0 else None


def _nearest(x: Any = None, size: Any = None, scales: Any = None, *rest: Any) -> Tensor | None:
    if rest or not _floats(x) or x.dim() != 4 or size is not None:
        return None
    last = torch.empty(x.shape, device="meta", memory_format=torch.channels_last).stride()
    if min(x.shape[1:]) == 1 or not (x.is_contiguous() or x.stride() == last):
        return None  # with a single row, column or channel the two orders look alike
    if not isinstance(scales, (list, tuple)) or len(scales) != 2 or any(type(f) is not float for f in scales):
        return None
    sizes = [math.floor(n * f) if 0 < f < _LARGEST else 0 for n, f in zip(x.shape[2:], scales, strict=True)]
    made = _contiguous(x, (*x.shape[:2], *sizes)) if min(sizes) > 0 else None
    return made if made is None or x.is_contiguous() else made.to(memory_format=torch.channels_last)


def _unary(*args: Any) -> Tensor | None:
    return _in_order(args[0]) if len(args) == 1 and _floats(args[0]) else None


_RULES: dict[str, Rule] = {
    "aten.add.Tensor": _arithmetic, "aten.sub.Tensor": _arithmetic, "aten.mul.Tensor": _arithmetic,
    "aten.div.Tensor": _binary,
    "aten.group_norm.default": _group_norm, "aten.layer_norm.default": _layer_norm, "aten.cat.default": _cat, "aten.linear.default": _linear,
    "aten.conv2d.default": _convolution, "aten.upsample_nearest2d.vec": _nearest,
    "aten.embedding.default": _embedding,
    "aten.scaled_dot_product_attention.default": _attention, "aten.silu.default": _unary, "aten.gelu.default": _unary,
    "aten.sin.default": _unary, "aten.cos.default": _unary, "aten.exp.default": _unary, "aten.relu.default": _unary,
}  # fmt: skip
