"""The convolution of an upsampled image as four integer convolutions, one for each phase of its pixels.

The program has ``crop(pixel_shuffle(quantize(conv2d_2x2(x))))`` (`passes.upsample_phases`): all windows at all places. Each
phase needs those of one corner only, and its codes are put between those of the others channels last, where a pixel is one
run of bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import fx

from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.quantizers import QUANTIZE

#: (row, column) of each phase in the result, in the order of the convolution's channels.
PHASES = ((1, 1), (1, 0), (0, 1), (0, 0))


def pixels_behind(node: fx.Node) -> fx.Node | None:
    """The cropped pixels of codes of a convolution that computes phases; None for any other node."""
    for name in (QUANTIZE, "aten.pixel_shuffle.default", "aten.constant_pad_nd.default"):
        readers = list(node.users)
        if len(readers) != 1 or op_name(readers[0].target) != name:
            return None
        node = readers[0]
    return node if list(node.args[1]) == [-1, -1, -1, -1] else None  # type: ignore[arg-type]


def convolutions(make: Callable[[int, slice, list[int]], ir.Value]) -> Emitted:
    """One convolution for each phase.

    Args:
        make: called with the phase, its channels, and its padding [top, left, bottom, right].
    """
    return tuple(
        make(index, slice(index, None, 4), [1 - row, 1 - column, row, column])
        for index, (row, column) in enumerate(PHASES)
    )


def pixel_shuffle(base: Emitter) -> Emitter:
    """Phases that are values of their own stay so until the crop."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        found = s.emitted[node.args[0]]  # type: ignore[index]
        return found if isinstance(found, tuple) else base(s, node)

    return emit


def crop(base: Emitter) -> Emitter:
    """Phases to pixels; any other padding as before."""

    def emit(s: Scope, node: fx.Node) -> Emitted:
        found = s.emitted[node.args[0]]  # type: ignore[index]
        is_phases = isinstance(found, tuple) and len(found) == 4 and s.dtype(node) == torch.int8
        return _merge(s, node, dict(zip(PHASES, found, strict=True))) if is_phases else base(s, node)  # type: ignore[arg-type]

    return emit


def _merge(s: Scope, node: fx.Node, phases: dict[tuple[int, int], ir.Value]) -> ir.Value:
    batch, channels, height, width = s.dims(node)
    rows = []
    for row in range(2):
        pixels = [s.op("Transpose", phases[row, column], perm=[0, 2, 3, 1]) for column in range(2)]
        joined = s.op("Concat", *pixels, axis=3)
        rows.append(s.reshape(joined, [batch, Dim(height.fixed // 2), Dim(width.fixed * channels.fixed)]))
    image = s.reshape(s.op("Concat", *rows, axis=2), [batch, height, width, channels])
    return s.op("Transpose", image, perm=[0, 3, 1, 2], name=node.name)
