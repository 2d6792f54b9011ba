"""Which integer convolutions have codes as their output on ONNX Runtime, and which can have float values.

ONNX Runtime's integer convolution writes 8-bit codes. Where that costs too much accuracy the layer is written as a
matrix product, whose integer form writes float values: with the patches gathered in front, or, where there are few
output channels, with the taps scattered behind (docs/onnx.md).
"""

from __future__ import annotations

from torch import fx

from edadm_compile.ir.arguments import argument, pair
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import LayerInfo

#: Output channels up to which a convolution is a product per tap and a sum over taps.
_FEW_OUTPUTS = 8


def convolution_form(node: fx.Node, info: LayerInfo) -> str:
    """How a quantized convolution runs: "direct" (codes out), "gather" or "scatter" (float out).

    Args:
        node: conv2d or conv_transpose2d.
        info: its layer record.
    """
    if not can_be_float(node, info):
        return "direct"
    if info.act_bits == 16:
        return "gather"
    if info.weight_shape[0] <= _FEW_OUTPUTS and pair(argument(node, 3, "stride", 1)) == [1, 1]:
        return "scatter"
    if info.float_output:
        return "gather"
    return "direct"


def can_be_float(node: fx.Node, info: LayerInfo | None) -> bool:
    """Whether a convolution can be written as a matrix product."""
    return info is not None and info.kind == "conv2d" and argument(node, 6, "groups", 1) == 1


def pixels_of(node: fx.Node) -> fx.Node:
    """The value that a convolution computes: `node`, or where it computes the phases of an upsampled image, the image.

    That is ``crop(pixel_shuffle(conv2d_2x2(x)))`` as `passes.upsample_phases` writes it.
    """
    if op_name(node.target) != "aten.conv2d.default":
        return node
    pixels = _only_reader(node, "aten.pixel_shuffle.default")
    cropped = None if pixels is None else _only_reader(pixels, "aten.constant_pad_nd.default")
    return cropped if cropped is not None and list(cropped.args[1]) == [-1, -1, -1, -1] else node  # type: ignore[arg-type]


def _only_reader(node: fx.Node, name: str) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and op_name(readers[0].target) == name else None


def writes_codes(node: fx.Node, info: LayerInfo | None) -> bool:
    """Whether a node is a quantized convolution in the direct form."""
    if info is None or info.kind not in ("conv2d", "conv_transpose2d") or info.weight_bits == 32:
        return False
    return convolution_form(node, info) == "direct"
