"""Cases of operators that look at more than one element.

Tolerances: a sum of n terms is exact to n / 2 ulps of the sum of their magnitudes at worst, and both sides round; the
inputs are within [-3, 3], so `largest` is 3 n for a plain sum and 9 n for a product of n terms, at 2 ulps each.
"""

from __future__ import annotations

import math

import torch

from tests.export.cases import Case, case
from tests.export.element_cases import BITS, BYTES, WHOLE, X
from tests.export.onnx_graphs import Constant, Given, Size, between, exactly, normal, whole

IMAGE, CODES = normal(4, 6, 8), whole(-128, 128, 4, 6, 8, dtype=torch.int8)
_GENERATOR = torch.Generator().manual_seed(1)


def weights(*shape: int, scale: float = 1.0) -> Constant:
    """A constant of normal numbers."""
    return Constant(scale * torch.randn(shape, generator=_GENERATOR).clamp(-3, 3))


def both(name: str, words: str, *args: object, **kwargs: object) -> list[Case]:
    """A movement of floats, and of the 8-bit codes that quantized layers read."""
    return [case(name, words, IMAGE, *args, **kwargs), case(name, f"{words}, codes", CODES, *args, **kwargs)]


SHAPES = [
    *both("view.default", "fixed", [-1, 24, 8]),
    case("view.default", "batch by its size", IMAGE, [Size(), 4, 48]),
    case("view.default", "batch joined", IMAGE, [-1, 8]),
    case("view.default", "batch moved", IMAGE, [4, -1, 48]),
    case("reshape.default", "batch split off", normal(6, batched=True), [-1, 2, 3]),
    case("reshape.default", "one more dimension than the batch", IMAGE, [Size(), -1, 2, 4, 6]),
    case("_unsafe_view.default", "fixed", IMAGE, [-1, 192]),
    case("view_as.default", "other tensor", IMAGE, normal(4, 48)),
    *both("flatten.using_ints", "trailing", 2),
    case("flatten.using_ints", "all", X),
    case("flatten.using_ints", "all, no dimensions", Constant(torch.tensor(2.0))),
    case("unflatten.int", "channels", IMAGE, 1, [2, -1]),
    *both("unsqueeze.default", "end", -1),
    case("squeeze.dim", "channel", normal(1, 3), 1),
    case("squeeze.dim", "not of size 1", X, -1),
    case("squeeze.dims", "two", normal(1, 3, 1), [1, -1]),
    case("squeeze.default", "all", normal(1, 3, 1)),
    *both("permute.default", "channels last", [0, 2, 3, -3]),
    case("permute.default", "as it is", X, [0, 1, 2]),
    *both("transpose.int", "last two", -1, -2),
    case("swapaxes.default", "batch", X, 0, 1),
    case("t.default", "matrix", normal(3)),
    case("t.default", "vector", normal()),
    case("movedim.int", "back", IMAGE, 1, -1),
    case("movedim.intlist", "two", IMAGE, [-1, 1], [1, 2]),
    *[case(f"{n}.default", "nothing to do", X) for n in ("contiguous", "clone", "alias", "lift_fresh_copy", "detach")],
    case("dropout.default", "in inference", X, 0.5, False),
    case("expand.default", "new and grown", normal(1, 3), [2, Size(), 4, -1]),
    case("expand.default", "kept sizes", normal(1, 3), [-1, 5, -1]),
    case("expand.default", "constant to the batch", X, [2, Size(), 3, 4]),
    case("expand_as.default", "other tensor", normal(1, 4), X),
    case("broadcast_to.default", "batch in front", Constant(torch.ones(3)), [2, 3]),
]

CUTS = [
    *both("slice.Tensor", "middle with a step", -1, 1, 7, 2),
    case("slice.Tensor", "from the end", X, 1, -2),
    case("slice.Tensor", "beyond the end", X, 2, 1, 2**63 - 1),
    case("slice.Tensor", "of the batch", X, 0, 1),
    case("slice.Tensor", "up to the batch size", normal(3, 4, batched=True), 0, 0, Size()),
    case("slice.Tensor", "everything", X),
    *both("select.int", "last", 1, -1),
    case("select.int", "of the batch", X, 0, 1),
    case("select.int", "last of the batch by its size", X, 0, Size(plus=-1)),
    *both("chunk.default", "even", 2, 1),
    case("chunk.default", "uneven", normal(7), 3, 1),
    case("chunk.default", "of twice the batch", Given(lambda b, g: torch.randn(2 * b, 3, generator=g), open=False), 2),
    case("chunk.default", "one", X, 1, 1),
    case("split.Tensor", "uneven", IMAGE, 5, -1),
    case(
        "split.Tensor", "of twice the batch", Given(lambda b, g: torch.randn(2 * b, 3, generator=g), open=False), 3, 1
    ),
    *both("split_with_sizes.default", "three", [1, 2, 1], 1),
    *both("unbind.int", "channels", 1),
    case("unbind.int", "one read", IMAGE, 1, items=(2,)),
]

REARRANGED = [
    *both("pixel_shuffle.default", "images", 2),
    *both("pixel_unshuffle.default", "images", 2),
    case("pixel_shuffle.default", "more dimensions", normal(2, 4, 3, 3), 2),
    *both("repeat.default", "channels", [1, 2, 1, 1]),
    case("repeat.default", "new dimension", X, [2, 1, 3, 1]),
    case("repeat.default", "as often as the batch", X, [1, Size(), 1]),
    *both("repeat_interleave.self_int", "columns", 2, -1),
    case("repeat_interleave.self_int", "flattened", X, 3),
    case("repeat_interleave.self_int", "batch", X, 2, 0),
    *both("constant_pad_nd.default", "zeros", [1, 2, 3, 0]),
    case("constant_pad_nd.default", "value", X, [1, 0], -2.5),
    case("constant_pad_nd.default", "cropped", IMAGE, [-1, -2, 1, 1]),
    case("constant_pad_nd.default", "codes with a value", CODES, [1, 1, 1, 1], -7),
    case("constant_pad_nd.default", "truth values", BITS, [0, 1], True),
    case("pad.default", "constant", IMAGE, [1, 1], "constant", 3.0),
    case("pad.default", "default", IMAGE, [0, 1, 0, 1]),
    *[case("pad.default", mode, IMAGE, [1, 2, 3, 0], mode) for mode in ("reflect", "replicate", "circular")],
    case("reflection_pad2d.default", "images", IMAGE, [1, 2, 3, 0]),
    case("reflection_pad2d.default", "without a batch", weights(2, 4, 5), [1, 2, 3, 0]),
    case("replication_pad2d.default", "images", IMAGE, [1, 2, 3, 0]),
    *both("roll.default", "two dimensions", [1, -3], [2, 3]),
    case("roll.default", "whole turn", X, [4], [2]),
    *both("flip.default", "two dimensions", [1, -1]),
    case("flip.default", "batch", X, [0]),
    case("unfold.default", "overlapping", IMAGE, 2, 3, 2),
    case("unfold.default", "last dimension", X, -1, 2, 1),
]

CREATED = [
    *[case(f"{n}.default", "like", X) for n in ("zeros_like", "ones_like")],
    case("zeros_like.default", "another type", X, dtype=torch.int64),
    case("empty_like.default", "like", X, shape_only=True),
    *[case(f"{n}.default", "with the batch", [Size(), 3]) for n in ("zeros", "ones")],
    case("zeros.default", "fixed, truth values", [2, 3], dtype=torch.bool),
    *[case(f"{n}.default", "with the batch", X, [Size(), 3]) for n in ("new_zeros", "new_ones")],
    case("new_full.default", "with the batch", WHOLE, [Size(), 3], 7),
    case("full.default", "with the batch", [Size(), 3], 2.5),
    case("full.default", "no dimensions", [], 2),
    case("full.default", "the batch size as the value", [2], Size(), dtype=torch.float32),
    case("full_like.default", "integers", WHOLE, 4),
    case("scalar_tensor.default", "float", 2.5),
    case("scalar_tensor.default", "the batch size", Size(), dtype=torch.int64),
    case("arange.default", "integers", 5),
    case("arange.default", "as floats", 5, dtype=torch.float32),
    case("arange.default", "up to the batch size", Size(), dtype=torch.float32),
    case("arange.start", "integers", 2, 7),
    case("arange.start", "from the batch size", Size(), 7, dtype=torch.int64),
    case("arange.start_step", "fractions", 0.0, 1.0, 0.3),
    case("arange.start_step", "downwards", 7, 0, -2),
    case("linspace.default", "floats", 0, 1, 7),
    case("meshgrid.indexing", "ij", [normal(3, batched=False), normal()], indexing="ij"),
    case("meshgrid.indexing", "xy", [normal(3, batched=False), normal(2, batched=False)], indexing="xy"),
    case("tril.default", "below", X, -1),
    case("triu.default", "floats", X),
    case("triu.default", "truth values", BITS, 1),
    case("one_hot.default", "labels", whole(0, 5, 3), 5),
    case("copy.default", "integers into floats, broadcast", X, whole(0, 5, 4, batched=False)),
]

JOINED = [
    case("cat.default", "channels", [IMAGE, normal(2, 6, 8)], 1),
    case("cat.default", "codes", [CODES, CODES], 1),
    case("cat.default", "integers with floats", [WHOLE, X], -1),
    case("cat.default", "batch", [X, X]),
    case("cat.default", "an empty tensor of another rank", [X, Constant(torch.empty(0))], 1),
    case("concat.default", "channels", [X, X], 1),
    case("hstack.default", "matrices", [X, normal(2, 4)]),
    case("hstack.default", "vectors and numbers", [normal(), Constant(torch.tensor(2.0))]),
    case("stack.default", "front", [X, X]),
    case("stack.default", "end, integers with floats", [WHOLE, X], -1),
]

TABLE, INDEX = Constant(torch.arange(24.0).reshape(6, 4)), whole(0, 6, 3)
INDEXED = [
    case("embedding.default", "table", TABLE, INDEX),
    case("index_select.default", "channels", IMAGE, 1, Constant(torch.tensor([3, 0, 0]))),
    case("index_select.default", "index without dimensions", IMAGE, 1, Constant(torch.tensor(2))),
    case("gather.default", "columns", X, 2, whole(0, 4, 3, 7)),
    case("gather.default", "smaller index", X, -1, whole(0, 4, 2, 1)),
    case("index.Tensor", "rows of a table", TABLE, [INDEX]),
    case("index.Tensor", "negative", IMAGE, [None, Constant(torch.tensor([-1, 1]))]),
    case("index.Tensor", "columns with two dimensions", X, [None, None, Constant(torch.tensor([[0, 3], [1, 1]]))]),
    case("index.Tensor", "two neighbours", IMAGE, [None, None, Constant(torch.tensor([[0], [-1]])),
                                                    Constant(torch.tensor([1, 2, 3]))]),
    case("index.Tensor", "two apart", IMAGE, [None, Constant(torch.tensor([0, 3])), None, Constant(torch.tensor([1, 2]))]),
    case("index.Tensor", "batch and channel", IMAGE, [whole(0, 2), Constant(torch.tensor([1]))]),
    case("index_put.default", "two neighbours", IMAGE, [None, Constant(torch.tensor([0, 3])), Constant(torch.tensor([1, 2]))],
         normal(2, 8)),
    case("index_put.default", "two apart, one value", IMAGE,
         [None, Constant(torch.tensor([0, 3])), None, Constant(torch.tensor([1, 2]))], Constant(torch.tensor(9.0))),
    case("index_put.default", "added, repeated", X, [None, Constant(torch.tensor([0, 0, 2]))], normal(3, 4), True, largest=9),
    case("index_put.default", "added, bytes", BYTES, [None, Constant(torch.tensor([0, 0]))],
         whole(0, 9, 2, 4, dtype=torch.int8), True),
    case("index_put.default", "mask of rows, one value", X, [whole(0, 2, 3, dtype=torch.bool)], Constant(torch.tensor(9.0))),
    case("index_put.default", "mask of images, one row of values", X, [whole(0, 2, dtype=torch.bool)], weights(3, 4)),
    case("scatter.src", "columns", X, -1, Constant(torch.tensor([[[3, 1]]])), normal(3, 4)),
    case("scatter.value", "truth values", BITS, 2, whole(0, 4, 3, 1), True),
    case("select_scatter.default", "channel", IMAGE, normal(6, 8), 1, -2),
    case("slice_scatter.default", "step", IMAGE, normal(4, 6, 3), 3, 1, 7, 2),
    case("slice_scatter.default", "everything", IMAGE, normal(4, 6, 8)),
    case("diagonal.default", "last two", IMAGE, 1, -2, -1),
    case("diagonal.default", "below", IMAGE, -2, 3, 1),
    case("bucketize.Tensor", "left", exactly([0.0, 1.0, 1.5, 9.0, math.nan]), Constant(torch.tensor([0.5, 1.0, 2.0]))),
    case("bucketize.Tensor", "right, int32", exactly([0.0, 1.0, 9.0]), Constant(torch.tensor([0.5, 1.0, 2.0])),
         right=True, out_int32=True),
    case("searchsorted.Tensor", "one row each", Given(lambda b, g: torch.rand(b, 5, generator=g).sort()[0]), between(0, 1, 3)),
    case("searchsorted.Tensor", "right side", Constant(torch.tensor([1, 2, 2, 5])), whole(0, 7, 4), side="right"),
]  # fmt: skip

REDUCED = [
    *[case(f"{n}.default", "all", X, largest=60, ulps=2) for n in ("mean", "sum")],
    *[case(f"{n}.default", w, v) for n in ("max", "min") for w, v in (("floats", X), ("integers", WHOLE), ("bytes", BYTES))],
    *[case(f"{n}.default", w, v) for n in ("all", "any") for w, v in (
        ("floats", exactly([0.0, 0.5])), ("all true", exactly([1, 1], torch.bool)), ("all false", exactly([0, 0], torch.bool)))],
    case("mean.dim", "pixels", IMAGE, [2, -1], largest=3),
    case("mean.dim", "kept", X, [1], True, largest=3),
    case("mean.dim", "batch", X, [0], largest=3),
    case("mean.dim", "all by None", X, None, largest=3),
    case("mean.default", "integers by type", WHOLE, dtype=torch.float32, largest=9),
    case("mean.default", "no dimensions", Constant(torch.tensor(2.0))),
    case("sum.default", "truth values", BITS),
    case("sum.dim_IntList", "pixels", IMAGE, [2, -1], largest=3 * 48, ulps=2),
    case("sum.dim_IntList", "all by an empty list", WHOLE, []),
    case("sum.dim_IntList", "bytes", BYTES, [1], True),
    case("sum.dim_IntList", "no dimensions", Constant(torch.tensor(2.0)), [0]),
    case("amax.default", "one", X, [-1], True),
    case("amax.default", "all", X),
    case("amin.default", "two", X, [1, 2]),
    case("prod.dim_int", "floats", X, 1, ulps=8),
    case("prod.dim_int", "integers", WHOLE, -1, True),
    case("logsumexp.default", "floats", X, [1], largest=4),
    case("var.correction", "default", X, [1], largest=9, ulps=8),
    case("var.correction", "population, kept", X, [1, -1], correction=0, keepdim=True, largest=9, ulps=12),
    case("var.correction", "all, batch included", X, correction=1, largest=9, ulps=8),
    case("var.correction", "fraction", X, [2], correction=0.5, largest=9, ulps=8),
    case("var.correction", "nothing left to divide by", normal(1, 3), [1]),
    case("var.dim", "biased", X, [2], False, largest=9, ulps=8),
    case("std.correction", "default", X, [2], largest=9, ulps=8),
    case("std.dim", "kept", X, [2], True, True, largest=9, ulps=8),
    case("var_mean.correction", "both", X, [2], correction=0, largest=9, ulps=8),
    case("var_mean.correction", "both, kept", X, [2], keepdim=True, largest=9, ulps=8),
    case("softmax.int", "channels", IMAGE, 1),
    case("softmax.int", "integers by type", WHOLE, -1, torch.float32, ulps=8),
    case("_softmax.default", "last", X, -1, False),
    case("softmax.int", "with -inf", exactly([0.0, -math.inf, 1.0]), -1),
    case("log_softmax.int", "last", X, -1, largest=4),
    case("cumsum.default", "floats", X, -1, largest=12),
    case("cumsum.default", "truth values", BITS, 1),
    case("cumsum.default", "no dimensions", Constant(torch.tensor(2.0)), 0),
    case("argmax.default", "flattened", X),
    case("argmax.default", "first of equals", exactly([1, 3, 3, 0], torch.int64), -1),
    case("argmax.default", "kept", X, 1, True),
    case("topk.default", "largest", X, 2),
    case("topk.default", "smallest, other dimension", X, 2, 1, False),
]  # fmt: skip

TENSOR_CASES = SHAPES + CUTS + REARRANGED + CREATED + JOINED + INDEXED + REDUCED
