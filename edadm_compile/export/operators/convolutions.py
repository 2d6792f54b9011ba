"""Float convolutions, with constant or computed weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from edadm_compile.export.operators.operands import fixed, spread
from edadm_compile.export.scope import Dim, Emitted, Emitter, Scope
from edadm_compile.ir.arguments import argument


def _emit(s: Scope, node: fx.Node, op_type: str, bias: Any, pads: list[int], **attributes: Any) -> Emitted:
    """A Conv or ConvTranspose; one without a batch dimension gets it for the time being."""
    source: Any = node.args[0]
    have = s.dims(source)
    kernel = _kernel(s, node)
    x = s.value(source)
    single = len(have) == len(kernel) + 1
    if single:
        x = s.reshape(x, [Dim(1), *have])
    inputs = [x, s.value(node.args[1])] + ([] if bias is None else [s.value(bias)])
    result = s.op(op_type, *inputs, pads=pads, kernel_shape=kernel, name=node.name, **attributes)
    return s.reshape(result, s.dims(node)) if single else result


def _kernel(s: Scope, node: fx.Node) -> list[int]:
    weight: Any = node.args[1]
    return [fixed(d, "convolution: the size of the kernel") for d in s.dims(weight)[2:]]


def _convolve(s: Scope, node: fx.Node, bias: Any, stride: Any, pads: list[int], dilation: Any, groups: Any) -> Emitted:
    rank = len(_kernel(s, node))
    strides, dilations = spread(stride, rank), spread(dilation, rank)
    return _emit(s, node, "Conv", bias, pads, strides=strides, dilations=dilations, group=int(groups))


def _conv(s: Scope, node: fx.Node) -> Emitted:
    rank = len(_kernel(s, node))
    stride, padding, dilation, groups = _arguments(node, ("stride", "padding", "dilation", "groups"))
    return _convolve(s, node, argument(node, 2, "bias"), stride, spread(padding, rank) * 2, dilation, groups)


def _arguments(node: fx.Node, names: tuple[str, ...]) -> list[Any]:
    """Arguments from the fourth on."""
    return [argument(node, 3 + i, n, 0 if "padding" in n else 1) for i, n in enumerate(names)]


def _string_padding(s: Scope, node: fx.Node) -> Emitted:
    """``padding="same"`` keeps the size; an odd padding has its extra zero at the end."""
    kernel = _kernel(s, node)
    stride, _, dilation, groups = _arguments(node, ("stride", "padding", "dilation", "groups"))
    same = argument(node, 4, "padding", "valid") == "same"
    total = [d * (k - 1) if same else 0 for d, k in zip(spread(dilation, len(kernel)), kernel, strict=True)]
    pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    return _convolve(s, node, argument(node, 2, "bias"), stride, pads, dilation, groups)


def _transposed(
    s: Scope, node: fx.Node, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any
) -> Emitted:
    rank = len(_kernel(s, node))
    return _emit(
        s, node, "ConvTranspose", argument(node, 2, "bias"), spread(padding, rank) * 2, strides=spread(stride, rank),
        dilations=spread(dilation, rank), output_padding=spread(output_padding, rank), group=int(groups),
    )  # fmt: skip


def _conv_transpose(s: Scope, node: fx.Node) -> Emitted:
    return _transposed(s, node, *_arguments(node, ("stride", "padding", "output_padding", "groups", "dilation")))


def _convolution(s: Scope, node: fx.Node) -> Emitted:
    """The common form of all: (x, w, bias, stride, padding, dilation, transposed, output_padding, groups)."""
    bias, stride, padding, dilation, transposed, output_padding, groups = node.args[2:]
    if transposed:
        return _transposed(s, node, stride, padding, output_padding, groups, dilation)
    return _convolve(s, node, bias, stride, spread(padding, len(_kernel(s, node))) * 2, dilation, groups)


TABLE: dict[str, Emitter] = {
    **{f"aten.{name}.default": _conv for name in ("conv1d", "conv2d", "conv3d")},
    **{f"aten.{name}.padding": _string_padding for name in ("conv1d", "conv2d")},
    "aten.conv_transpose1d.default": _conv_transpose,
    "aten.conv_transpose2d.input": _conv_transpose,
    "aten.convolution.default": _convolution,
}
