"""Operands of float operators: types that ONNX Runtime computes in, type promotion, axes, sizes with an open batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.builder import DTYPES
from edadm_compile.export.scope import Dim, Scope
from edadm_compile.ir.ops import op_name

#: Types without kernels for most arithmetic in ONNX Runtime, computed as int32 (casting back wraps, as torch does).
_NARROW = {torch.bool, torch.int8, torch.uint8, torch.int16}
#: An end beyond every size; `Slice` clips it.
FAR = 2**63 - 1


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that values of `dtype` are computed in."""
    return torch.int32 if dtype in _NARROW else dtype


def cast(s: Scope, value: ir.Value, have: torch.dtype, want: torch.dtype) -> ir.Value:
    """`value`, converted where the types differ.

    Raises:
        ExportError: a type that ONNX does not have.
    """
    if want not in DTYPES:
        raise ExportError(f"type {want} has no ONNX form")
    return value if have == want else s.op("Cast", value, to=DTYPES[want])


def promoted(s: Scope, a: Any, b: Any) -> torch.dtype:
    """The type torch computes these operands in: tensors beat tensors without dimensions, which beat numbers."""
    return torch.result_type(_stand_in(s, a), _stand_in(s, b))


def _stand_in(s: Scope, arg: Any) -> Any:
    if s.is_tensor(arg):
        return torch.empty((1,) * s.rank(arg), dtype=s.dtype(arg), device="meta")
    plain = s.plain(arg)
    return 1 if isinstance(plain, Dim) else plain


def select(s: Scope, condition: ir.Value, a: ir.Value, b: ir.Value, dtype: torch.dtype, name: str = "") -> ir.Value:
    """Where, for every type."""
    work = torch.int32 if dtype in (torch.bool, torch.int16) else dtype
    return cast(s, s.op("Where", condition, cast(s, a, dtype, work), cast(s, b, dtype, work), name=name), work, dtype)


def axis_of(s: Scope, arg: Any, dim: int) -> int:
    """A dimension counted from the front."""
    return dim % max(s.rank(arg), 1)


def axes_of(s: Scope, arg: Any, dims: Any) -> list[int]:
    """Dimensions counted from the front, ascending; all of them for None and for an empty list."""
    rank = max(s.rank(arg), 1)
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))


def at_least_1d(s: Scope, arg: Any, dtype: torch.dtype | None = None) -> ir.Value:
    """Value of a tensor argument, one without dimensions as [1]."""
    value = s.value(arg, dtype)
    return value if s.rank(arg) else s.op("Reshape", value, s.const([1]))


def as_node(s: Scope, value: ir.Value, node: fx.Node) -> ir.Value:
    """What was computed from `at_least_1d` in the shape of the node: back to no dimensions where it has none."""
    return value if s.rank(node) else s.reshape(value, ())


def used(node: fx.Node, index: int) -> bool:
    """Whether anything reads item `index` of a list."""
    return any(op_name(user.target) != "operator.getitem" or user.args[1] == index for user in node.users)


def refuse_items(node: fx.Node, indices: Iterable[int], what: str) -> None:
    """Raise `ExportError` if one of these items of the result is read."""
    if any(used(node, index) for index in indices):
        raise ExportError(f"{op_name(node.target)}: {what} have no ONNX form")


def fixed(size: Any, what: str) -> int:
    """A size as a number.

    Raises:
        ExportError: it depends on the batch.
    """
    if isinstance(size, Dim) and not size.is_fixed:
        raise ExportError(f"{what} depends on the batch size, which is open in the ONNX graph")
    return size.fixed if isinstance(size, Dim) else int(size)


def as_dim(size: Any) -> Dim:
    """A plain size as a `Dim`."""
    return size if isinstance(size, Dim) else Dim(int(size))


def times(dims: Sequence[Dim]) -> Dim:
    """Product of sizes.

    Raises:
        ExportError: more than one depends on the batch.
    """
    result = Dim(1)
    for dim in dims:
        if not (result.is_fixed or dim.is_fixed):
            raise ExportError("the size of the result is not a multiple of the batch size")
        if dim.is_fixed:
            result = Dim(result.fixed * dim.fixed, result.per_image * dim.fixed)
        else:
            result = Dim(dim.fixed * result.fixed, dim.per_image * result.fixed)
    return result


def broadcast(*shapes: Sequence[Dim]) -> list[Dim]:
    """Sizes of the result of operands with these sizes."""
    rank = max(len(shape) for shape in shapes)
    padded = [[Dim(1)] * (rank - len(shape)) + list(shape) for shape in shapes]
    return [next((d for d in column if d != Dim(1)), Dim(1)) for column in zip(*padded, strict=True)]


def spread(value: Any, count: int) -> list[int]:
    """An int or a list as a list of `count` ints."""
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def transpose(s: Scope, value: ir.Value, order: Sequence[int], name: str = "") -> ir.Value:
    """Transpose; nothing where the order is the present one."""
    if list(order) == sorted(order):
        return value
    return s.op("Transpose", value, perm=list(order), name=name)


def bound(s: Scope, value: Any) -> ir.Value:
    """int64 [1] of a number or a size."""
    return s.size(value) if isinstance(value, Dim) else s.const([int(value)])


def scalar(s: Scope, value: Any) -> ir.Value:
    """int64 [] of a number or a size."""
    return s.reshape(s.size(value), ()) if isinstance(value, Dim) else s.const(int(value))


def cut(s: Scope, value: ir.Value, axis: int, start: Any, end: Any, step: int = 1, name: str = "") -> ir.Value:
    """Slice along one axis; `start` and `end` are numbers or sizes."""
    return s.op("Slice", value, bound(s, start), bound(s, end), s.const([axis]), s.const([step]), name=name)
