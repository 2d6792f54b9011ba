"""The form in which a convolution runs on ONNX Runtime, and the value that is quantized behind it."""

from dataclasses import replace

import pytest

from edadm_compile.ir.output_codes import convolution_form, pixels_of, writes_codes
from edadm_compile.ir.program import LayerInfo
from tests.graphs import GraphBuilder

CONV2D, TRANSPOSE = "aten.conv2d.default", "aten.conv_transpose2d.input"


def convolution(*extra, kind="conv2d", outer=16, inner=4, kernel=3, **info):
    """A node and its record; `extra` are the arguments behind the bias."""
    build = GraphBuilder()
    groups = extra[3] if len(extra) > 3 else 1
    shape = (outer, inner // groups, kernel, kernel) if kind == "conv2d" else (inner, outer // groups, kernel, kernel)
    weight = build.constant("c.weight", build.random(*shape))
    node = build.op(CONV2D if kind == "conv2d" else TRANSPOSE, build.x, weight, None, *extra)
    return node, LayerInfo("c", kind, shape, "inner", info.pop("weight_bits", 4), info.pop("act_bits", 8), **info)


@pytest.mark.parametrize(
    ("arguments", "info", "form"),
    [
        ((), {}, "direct"),
        (([1, 1], [1, 1]), {}, "direct"),
        (([1, 1], [1, 1]), {"outer": 9}, "direct"),
        (([1, 1], [1, 1]), {"outer": 8}, "scatter"),
        ((), {"outer": 8}, "scatter"),
        (([1], [1]), {"outer": 3}, "scatter"),
        (([1, 1], [1, 1]), {"outer": 1, "kernel": 1}, "scatter"),
        (([1, 1], [2, 2], [2, 2]), {"outer": 3}, "scatter"),
        (([2, 2], [1, 1]), {"outer": 8}, "direct"),  # the taps of a strided convolution do not meet
        (([1, 2], [1, 1]), {"outer": 8}, "direct"),
        (([2, 1], [1, 1]), {"outer": 8}, "direct"),
        (([2, 2], [1, 1]), {}, "direct"),
        (([2, 2], [1, 1]), {"float_output": True}, "gather"),
        (([2, 2], [1, 1]), {"outer": 8, "float_output": True}, "gather"),
        (([1, 1], [1, 1]), {"float_output": True}, "gather"),
        (([1, 1], [1, 1]), {"outer": 8, "float_output": True}, "scatter"),
        (([1, 1], [1, 1]), {"act_bits": 16}, "gather"),
        (([1, 1], [1, 1]), {"act_bits": 16, "outer": 3}, "gather"),
        (([2, 2], [1, 1]), {"act_bits": 16, "outer": 3}, "gather"),
        (([1, 1], [1, 1]), {"act_bits": 4}, "direct"),
        (([1, 1], [1, 1], [1, 1], 2), {}, "direct"),
        (([1, 1], [1, 1], [1, 1], 4), {"outer": 4}, "direct"),  # depthwise to few channels
        (([1, 1], [1, 1], [1, 1], 2), {"float_output": True}, "direct"),
        (([1, 1], [1, 1], [1, 1], 2), {"act_bits": 16}, "direct"),
        (([1, 1], [1, 1], [1, 1], 1), {"outer": 4}, "scatter"),
        (([2, 2], [1, 1]), {"kind": "conv_transpose2d"}, "direct"),
        (([1, 1], [1, 1]), {"kind": "conv_transpose2d", "outer": 3}, "direct"),
        (([1, 1], [1, 1]), {"kind": "conv_transpose2d", "inner": 4, "outer": 16}, "direct"),  # weight [4, 16, ...]
        (([1, 1], [1, 1]), {"kind": "conv_transpose2d", "float_output": True}, "direct"),
        (([1, 1], [1, 1]), {"kind": "conv_transpose2d", "act_bits": 16}, "direct"),
    ],
    ids=str,
)
def test_forms(arguments, info, form):
    node, record = convolution(*arguments, **info)
    assert convolution_form(node, record) == form
    assert writes_codes(node, record) is (form == "direct")


def test_arguments_by_name():
    node, record = convolution(outer=3)
    node.kwargs = {"stride": [2, 2]}
    assert convolution_form(node, record) == "direct"
    node.kwargs = {"stride": [1, 1], "groups": 2}
    assert convolution_form(node, record) == "direct"
    node.kwargs = {"stride": 1}
    assert convolution_form(node, record) == "scatter"


def test_only_quantized_convolutions_write_codes():
    node, record = convolution([1, 1], [1, 1])
    assert writes_codes(node, record)
    assert not writes_codes(node, None)
    assert not writes_codes(node, replace(record, weight_bits=32, act_bits=32))
    for kind in ("linear", "matmul", "attention", "conv1d"):
        assert not writes_codes(node, replace(record, kind=kind))


# pixels_of


def chain(crop=(-1, -1, -1, -1), *, shuffle="aten.pixel_shuffle.default", second=""):
    """The convolution, its shuffle and its crop; `second`: which of them has another reader."""
    build = GraphBuilder()
    conv = build.conv("c", build.x, 4, 16)
    shuffled = build.op(shuffle, conv, 2)
    cropped = build.op("aten.constant_pad_nd.default", shuffled, list(crop))
    total = cropped
    for name, node in (("conv", conv), ("shuffle", shuffled), ("crop", cropped)):
        if name == second:
            total = build.op("aten.mul.Tensor", cropped, build.op("aten.mean.default", node))
    build.graph.output(total)
    return conv, cropped


def test_the_pixels_of_phases_are_the_cropped_image():
    conv, cropped = chain()
    assert pixels_of(conv) is cropped
    conv, cropped = chain(second="crop")  # readers of the image itself are free
    assert pixels_of(conv) is cropped


@pytest.mark.parametrize(
    "change",
    [
        {"crop": (0, 0, 0, 0)}, {"crop": (1, 1, 1, 1)}, {"crop": (-1, -1)}, {"crop": (-1, -1, -1, 0)},
        {"shuffle": "aten.pixel_unshuffle.default"}, {"second": "conv"}, {"second": "shuffle"},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_the_value_of_the_convolution(change):
    conv, _ = chain(**change)
    assert pixels_of(conv) is conv


def test_only_convolutions_have_phases():
    build = GraphBuilder()
    weight = build.constant("c.weight", build.random(4, 16, 3, 3))
    conv = build.op(TRANSPOSE, build.x, weight)
    build.op("aten.constant_pad_nd.default", build.op("aten.pixel_shuffle.default", conv, 2), [-1, -1, -1, -1])
    assert pixels_of(conv) is conv


def test_a_convolution_without_readers_is_its_own_value():
    build = GraphBuilder()
    conv = build.conv("c", build.x, 4, 16)
    assert pixels_of(conv) is conv
