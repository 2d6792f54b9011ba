"""Resizing of images, and sampling at given places."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.errors import ExportError
from edadm_compile.export.operators.operands import fixed
from edadm_compile.export.operators.pooling import images, shaped
from edadm_compile.export.scope import Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument
from edadm_compile.ir.ops import op_name, resolve

_LINEAR, _CUBIC = "aten.upsample_bilinear2d.default", "aten.upsample_bicubic2d.default"
_ANTIALIASED = "aten._upsample_bilinear2d_aa.default"
_GRID_MODES = ("linear", "nearest", "cubic")
_GRID_PADDING = ("zeros", "border", "reflection")


def nearest(spatial: int) -> Emitter:
    """Copies of the nearest element; valid for codes.

    Integer factors of images are a Resize (ONNX Runtime 1.32 has a fast path for it: 0.02 ms against 1.8 ms for an Expand
    of 256 channels of 16x16 codes). For others torch itself tells, here, which element it takes: one Gather per dimension.
    """

    def emit(s: Scope, node: fx.Node) -> Emitted:
        x, have, sizes = images(s, node, spatial)
        want = [fixed(d, "upsample: a size of the result") for d in s.dims(node)[-spatial:]]
        tables = [_sources(s, node, spatial, i, n) for i, n in enumerate(sizes)]
        repeats = [m // n if m % n == 0 else 0 for m, n in zip(want, sizes, strict=True)]
        whole = all(
            r and t.equal(torch.arange(n).repeat_interleave(r))
            for r, t, n in zip(repeats, tables, sizes, strict=True)
        )  # fmt: skip
        if whole:
            # Without the attribute axes: ONNX Runtime 1.32's layout optimizer breaks a Resize that has it.
            scales = s.const([1.0, 1.0, *(float(r) for r in repeats)])
            modes = {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
            x = s.op("Resize", x, None, scales, mode="nearest", name=node.name, **modes)
            return shaped(s, node, x, have)
        for i, table in enumerate(tables):
            x = s.op("Gather", x, s.const(table), axis=2 + i, name=node.name)
        return shaped(s, node, x, have)

    return emit


def _sources(s: Scope, node: fx.Node, spatial: int, dim: int, size: int) -> torch.Tensor:
    """Which element along one dimension each result is a copy of: the operator itself on 0, 1, 2, ..."""
    line = torch.arange(size, dtype=torch.float32).reshape([1, 1, *(size if i == dim else 1 for i in range(spatial))])
    source: Any = node.args[0]
    image = line.expand([1, 1, *(fixed(d, "upsample: a size") for d in s.dims(source)[-spatial:])])
    result: torch.Tensor = resolve(op_name(node.target))(
        image.contiguous(), *s.plain(list(node.args[1:])), **node.kwargs
    )
    at = (0, 0, *(slice(None) if i == dim else 0 for i in range(spatial)))
    return result[at].long()


def smooth(operator: str, mode: str | None, spatial: int = 2) -> Emitter:
    """Weighted means of neighbours, by torch's coordinates: its scale factors where given, else the ratio of the sizes.

    Args:
        operator: the same for images in torch.
        mode: of Resize; None for always a product with the weights. Resize has ``antialias=1``, but the weights of ONNX
            Runtime are others than torch's where the image shrinks.
    """

    def emit(s: Scope, node: fx.Node) -> Emitted:
        x, have, sizes = images(s, node, spatial)
        want = [fixed(d, "upsample: a size of the result") for d in s.dims(node)[-spatial:]]
        align = bool(argument(node, 2, "align_corners"))
        factors: list[Any] = [None] * spatial if align else _factors(node, spatial)
        if mode == "linear":  # where the size stays torch copies, whatever the factor
            factors = [1.0 if f and n == m else f for f, n, m in zip(factors, sizes, want, strict=True)]
        inputs = _resize_inputs(s, x, sizes, want, factors)
        if operator == _ANTIALIASED and 1 in (sizes[-1], want[-1]):
            raise ExportError("antialiased resizing from or to a width of 1: torch 2.13 computes columns wrongly there")
        if mode is None or inputs is None:
            tables = (_weights(operator, *how, align) for how in zip(sizes, want, factors, strict=True))
            return shaped(s, node, _by_products(s, x, list(tables), node.name), have)
        result = s.op(
            "Resize", x, None, *inputs, mode=mode,
            coordinate_transformation_mode="align_corners" if align else "half_pixel", name=node.name,
        )  # fmt: skip
        return shaped(s, node, result, have)

    return emit


def _resize_inputs(
    s: Scope, x: ir.Value, sizes: list[int], want: list[int], factors: list[Any]
) -> list[ir.Value | None] | None:
    """Scales or sizes for Resize; None where it cannot be told both torch's factors and the size of the result."""
    if all(f is None for f in factors):
        return [None, s.op("Concat", s.op("Shape", x, start=0, end=2), s.const(want), axis=0)]
    if None in factors:
        return None
    scales, counts = torch.tensor(factors, dtype=torch.float32), torch.tensor(sizes)
    reached = [(counts * scales).floor(), (counts * scales.double()).floor()]  # ONNX Runtime; onnx.checker
    return [s.const(torch.cat((torch.ones(2), scales)))] if all(r.tolist() == want for r in reached) else None


def _by_products(s: Scope, x: ir.Value, tables: list[torch.Tensor], name: str) -> ir.Value:
    """Products with the weights of each dimension, the last one first, as torch does."""
    x = s.op("MatMul", x, s.const(tables[-1].T), name=name)
    return x if len(tables) == 1 else s.op("MatMul", s.const(tables[0]), x, name=name)


def _weights(operator: str, size: int, want: int, factor: float | None, align: bool) -> torch.Tensor:
    """[want, size] weights along one dimension. Torch itself tells them, here: it resizes the unit vectors."""
    units = torch.eye(size).reshape(1, size, 1, size)  # as lines: columns come out wrong in torch 2.13
    resized: torch.Tensor = resolve(operator)(units, [1, want], align, None, factor)
    return resized[0, :, 0].T


def _factors(node: fx.Node, spatial: int) -> list[Any]:
    """Scale factors as given, None for those that are not."""
    if op_name(node.target).endswith(".vec"):
        return list(argument(node, 3, "scale_factors") or [None] * spatial)
    return [argument(node, 3 + i, n) for i, n in enumerate(("scales_h", "scales_w"))]


def _grid_sampler(s: Scope, node: fx.Node) -> Emitted:
    x, grid = (s.value(a) for a in node.args[:2])
    mode, padding, align = (int(argument(node, i, n)) for i, n in enumerate(
        ("interpolation_mode", "padding_mode", "align_corners"), 2))  # fmt: skip
    return s.op(
        "GridSample", x, grid, mode=_GRID_MODES[mode], padding_mode=_GRID_PADDING[padding], align_corners=align,
        name=node.name,
    )  # fmt: skip


TABLE: dict[str, Emitter] = {
    "aten.upsample_nearest1d.vec": nearest(1),
    **{f"aten.{name}": nearest(2) for name in (
        "upsample_nearest2d.vec", "upsample_nearest2d.default", "_upsample_nearest_exact2d.vec")},
    "aten.upsample_linear1d.vec": smooth(_LINEAR, "linear", 1),
    **{f"aten.upsample_bilinear2d.{overload}": smooth(_LINEAR, "linear") for overload in ("vec", "default")},
    **{f"aten.upsample_bicubic2d.{overload}": smooth(_CUBIC, "cubic") for overload in ("vec", "default")},
    _ANTIALIASED: smooth(_ANTIALIASED, None),
    "aten.grid_sampler.default": _grid_sampler,
}  # fmt: skip
