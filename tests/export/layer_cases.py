"""Cases of normalizations, matrix products, convolutions, pooling and resizing.

Tolerances: see tensor_cases. Where a resizing looks, a rounded coordinate moves it by an ulp of the size (at most 20), and
neighbours differ by up to 6: two ulps of 6 on average, 8 allowed.
"""

from __future__ import annotations

import math

import torch

from tests.export.cases import Case, case
from tests.export.element_cases import BYTES, WHOLE, X
from tests.export.onnx_graphs import Constant, Size, between, normal, whole
from tests.export.tensor_cases import IMAGE, weights

ROW, GAMMA, BETA = normal(4), weights(4), weights(4)
#: Values of a normalization are at most 3 sqrt(n); dividing by a deviation near 1 costs what the mean's error is.
NORM = {"ulps": 8, "largest": 8}

NORMS = [
    case("group_norm.default", "images", IMAGE, 2, GAMMA, BETA, 1e-6, **NORM),
    case("group_norm.default", "without parameters", IMAGE, 4, **NORM),
    case("group_norm.default", "weight alone", IMAGE, 1, GAMMA, **NORM),
    case("group_norm.default", "bias alone", IMAGE, 2, None, BETA, **NORM),
    case("group_norm.default", "rows", ROW, 2, GAMMA, BETA, **NORM),
    case("group_norm.default", "sequences", normal(4, 7), 2, GAMMA, BETA, **NORM),
    case("group_norm.default", "computed weight", IMAGE, 2, normal(4, batched=False), BETA, **NORM),
    case("native_group_norm.default", "result alone", normal(4, 6), GAMMA, BETA, Size(), 4, 6, 2, 1e-5, items=(0,), **NORM),
    case("native_group_norm.default", "with statistics", normal(4, 6), None, None, Size(), 4, 6, 2, 1e-5, **NORM),
    case("layer_norm.default", "last dimension", X, [4], GAMMA, BETA, **NORM),
    case("layer_norm.default", "two dimensions", X, [3, 4], weights(3, 4), weights(3, 4), **NORM),
    case("layer_norm.default", "without parameters", X, [4], **NORM),
    case("layer_norm.default", "weight alone", X, [4], GAMMA, None, 1e-3, **NORM),
    case("layer_norm.default", "bias alone", X, [4], None, BETA, **NORM),
    case("native_layer_norm.default", "with statistics", X, [4], GAMMA, BETA, 1e-5, **NORM),
    case("native_layer_norm.default", "result alone", X, [4], GAMMA, None, 1e-5, items=(0,), **NORM),
    case("batch_norm.default", "in inference", IMAGE, GAMMA, BETA, BETA, Constant(torch.tensor([0.5, 1, 2, 3])), False, 0.1,
         1e-5, True, **NORM),
    case("batch_norm.default", "without parameters", ROW, None, None, BETA, Constant(torch.tensor([0.5, 1, 2, 3])), False, 0.1,
         1e-5, True, **NORM),
    case("_native_batch_norm_legit_no_training.default", "images", IMAGE, GAMMA, BETA, BETA,
         Constant(torch.tensor([0.5, 1, 2, 3])), 0.1, 1e-5, items=(0,), **NORM),
    case("instance_norm.default", "own statistics", IMAGE, GAMMA, BETA, None, None, True, 0.1, 1e-5, True, **NORM),
    case("instance_norm.default", "stored statistics", IMAGE, None, None, BETA, Constant(torch.tensor([0.5, 1, 2, 3])), False,
         0.1, 1e-5, True, **NORM),
    case("rms_norm.default", "weight", X, [4], GAMMA, 1e-5, largest=4),
    case("rms_norm.default", "two dimensions, default eps", X, [3, 4], largest=4),
    *[case("linalg_vector_norm.default", f"order {order}", X, order, [1], largest=5, ulps=16)
      for order in (2, 1, 0, 3, math.inf, -math.inf)],
    case("linalg_vector_norm.default", "everything, kept", X, 2, None, True, largest=12, ulps=16),
    case("norm.ScalarOpt_dim", "default order", X, None, [-1], True, ulps=8),
    case("norm.ScalarOpt_dim", "order 1", X, 1, [1, 2], largest=36),
    case("norm.Scalar", "all", X, largest=12, ulps=16),
    *[case("_weight_norm.default", f"dimension {d}", weights(3, 4), weights(*s), d, ulps=8)
      for d, s in ((0, (3, 1)), (1, (1, 4)), (-1, ()))],
]  # fmt: skip

HEADS = normal(2, 5, 4), normal(2, 7, 4), normal(2, 7, 6)
MASK = Constant(torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) > 0.4)
BLIND = Constant(MASK.value.clone().index_fill_(0, torch.tensor([2]), False))
#: A score is off by 4 ulps of its largest term sum (36), and so is the logarithm of a weight.
ATTENTION = {"ulps": 16, "largest": 36}

PRODUCTS = [
    case("mm.default", "matrices", ROW, weights(4, 5), largest=36),
    case("bmm.default", "batches", X, normal(4, 5), largest=36),
    case("matmul.default", "integers", WHOLE, Constant(torch.arange(8).reshape(4, 2))),
    case("matmul.default", "bytes wrap", whole(-100, 101, 3, 4, dtype=torch.int8), Constant(BYTES.make(4, torch.Generator())[0].T)),
    case("matmul.default", "broadcast", normal(2, 3, 4), normal(1, 4, 5), largest=36),
    case("matmul.default", "by a vector", X, weights(4), largest=36),
    case("matmul.default", "vectors", weights(4), weights(4), largest=36),
    case("addmm.default", "plain", weights(5), ROW, weights(4, 5), largest=40),
    case("addmm.default", "beta and alpha", weights(5), ROW, weights(4, 5), beta=0.5, alpha=2, largest=80),
    case("addmm.default", "beta 0 ignores NaN", Constant(torch.full((5,), math.nan)), ROW, weights(4, 5), beta=0, largest=36),
    case("baddbmm.default", "beta and alpha", normal(3, 5), X, normal(4, 5), beta=0.5, alpha=0.25, largest=36),
    case("einsum.default", "attention scores", "bhid, bhjd -> bhij", [HEADS[0], HEADS[1]], largest=36),
    case("einsum.default", "ellipsis", "...c,cd->...d", [X, weights(4, 5)], largest=36),
    case("einsum.default", "three operands", "bij,jk,kl->bil", [X, weights(4, 2), weights(2, 3)], largest=216),
    case("outer.default", "vectors", normal(), weights(4)),
    case("linear.default", "constant weight", X, weights(5, 4), weights(5), largest=40),
    case("linear.default", "without a bias", ROW, weights(5, 4), largest=36),
    case("linear.default", "computed weight", X, normal(5, 4, batched=False), largest=36),
    case("linear.default", "one row of weights", X, weights(4), largest=36),
    case("bilinear.default", "bias", X, normal(3, 5), weights(2, 4, 5), weights(2), largest=27 * 20),
    case("bilinear.default", "without a bias", ROW, normal(5), weights(2, 4, 5), largest=27 * 20),
    case("cdist.default", "distance 2", X, normal(5, 4), largest=12),
    case("cdist.default", "distance 1", X, normal(5, 4), 1.0, largest=24),
    case("scaled_dot_product_attention.default", "plain", *HEADS, **ATTENTION),
    case("scaled_dot_product_attention.default", "without heads", *(normal(n, m) for n, m in ((5, 4), (7, 4), (7, 6))), **ATTENTION),
    case("scaled_dot_product_attention.default", "scale", *HEADS, scale=0.1, **ATTENTION),
    case("scaled_dot_product_attention.default", "causal", *HEADS, None, 0.0, True, **ATTENTION),
    case("scaled_dot_product_attention.default", "constant mask", *HEADS, MASK, **ATTENTION),
    case("scaled_dot_product_attention.default", "constant mask that hides everything from one", *HEADS, BLIND, **ATTENTION),
    case("scaled_dot_product_attention.default", "constant addition", *HEADS, weights(5, 7), **ATTENTION),
    case("scaled_dot_product_attention.default", "mask per image", *HEADS, whole(0, 2, 1, 5, 7, dtype=torch.bool), **ATTENTION),
    case("scaled_dot_product_attention.default", "addition per image", *HEADS, normal(2, 1, 7), **ATTENTION),
]  # fmt: skip

SEQUENCE, VOLUME = normal(4, 9), normal(2, 4, 5, 3)
CONVOLUTIONS = [
    case("conv1d.default", "settings", SEQUENCE, weights(6, 2, 3), weights(6), [2], [1], [2], 2, largest=60),
    case("conv1d.default", "computed weight", SEQUENCE, normal(3, 4, 3, batched=False), largest=108),
    case("conv1d.padding", "same, even kernel", SEQUENCE, weights(3, 4, 4), None, [1], "same", [1], 1, largest=144),
    case("conv2d.default", "settings", IMAGE, weights(6, 2, 3, 2), weights(6), [2, 1], [1, 0], [1, 2], 2, largest=112),
    case("conv2d.default", "defaults", IMAGE, weights(3, 4, 1, 1), largest=36),
    case("conv2d.default", "without a batch", weights(4, 6, 5), weights(3, 4, 3, 3), largest=324),
    case("conv2d.padding", "same, even kernel, dilated", IMAGE, weights(3, 4, 2, 3), None, [1, 1], "same", [3, 2], 1, largest=216),
    case("conv2d.padding", "valid", IMAGE, weights(3, 4, 3, 3), weights(3), [2, 2], "valid", largest=324),
    case("conv3d.default", "settings", VOLUME, weights(3, 2, 3, 3, 2), None, [1, 2, 1], [1, 1, 0], largest=324),
    case("conv_transpose1d.default", "settings", SEQUENCE, weights(4, 3, 3), weights(6), [2], [1], [1], 2, [2], largest=108),
    case("conv_transpose2d.input", "settings", IMAGE, weights(4, 3, 3, 2), weights(6), [2, 3], [1, 0], [1, 2], 2, [1, 2],
         largest=216),
    case("conv_transpose2d.input", "computed weight", IMAGE, normal(4, 2, 3, 3, batched=False), None, [2, 2], [1, 1], largest=324),
    case("convolution.default", "images", IMAGE, weights(6, 2, 3, 3), weights(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 2,
         largest=162),
    case("convolution.default", "transposed sequences", SEQUENCE, weights(4, 3, 3), None, [2], [1], [1], True, [1], 1, largest=108),
]  # fmt: skip

POOLING = [
    case("avg_pool2d.default", "plain", IMAGE, [2, 2], largest=3),
    case("avg_pool2d.default", "padding counted", IMAGE, [3, 3], [2, 2], [1, 1], largest=3),
    case("avg_pool2d.default", "padding not counted", IMAGE, 3, 2, 1, False, False, largest=3),
    case("avg_pool2d.default", "rounded up", IMAGE, [4, 3], [3, 3], [1, 1], True, largest=3),
    case("avg_pool2d.default", "rounded up, not counted", IMAGE, [4, 3], [3, 3], [1, 1], True, False, largest=3),
    case("avg_pool2d.default", "divisor", IMAGE, [3, 3], [2, 2], [1, 1], False, True, 5, largest=6),
    case("avg_pool2d.default", "divisor, rounded up", IMAGE, [3, 3], [2, 2], [1, 1], True, False, 5, largest=6),
    case("avg_pool2d.default", "without a batch", weights(4, 6, 5), [2, 2], largest=3),
    case("avg_pool1d.default", "padding counted", SEQUENCE, [3], [2], [1], largest=3),
    case("avg_pool1d.default", "rounded up", SEQUENCE, [4], [3], [1], True, largest=3),
    case("max_pool2d.default", "plain", IMAGE, [2, 2]),
    case("max_pool2d.default", "settings", IMAGE, [3, 2], [2, 1], [1, 0], [1, 2]),
    case("max_pool2d.default", "rounded up", IMAGE, [4, 3], [3, 3], [1, 1], 1, True),
    case("max_pool2d.default", "rounded up, last window dropped", normal(2, 5, 5), 2, 3, 1, 1, True),
    *[case(f"max_pool2d{n}.default", "rounded up, dilated", normal(2, 8, 9), [2, 3], [4, 2], [1, 0], 2, True)
      for n in ("", "_with_indices")],
    case("max_pool2d_with_indices.default", "both", IMAGE, [3, 2], [2, 2], [1, 0]),
    case("max_pool2d_with_indices.default", "without a batch", weights(4, 6, 5), [2, 2]),
    *[case(f"{name}.default", words, IMAGE, size, largest=3) for name in ("adaptive_avg_pool2d", "_adaptive_avg_pool2d")
      for words, size in (("one", [1, 1]), ("even", [3, 4]), ("uneven", [4, 5]), ("wider", [9, 8]))],
    case("adaptive_avg_pool2d.default", "without a batch", weights(4, 6, 5), [4, 2], largest=3),
    case("adaptive_max_pool2d.default", "values", IMAGE, [4, 5], items=(0,)),
    case("adaptive_max_pool2d.default", "both", IMAGE, [4, 5]),
    case("adaptive_max_pool2d.default", "without a batch", weights(4, 6, 5), [3, 2]),
    case("im2col.default", "settings", IMAGE, [3, 2], [1, 2], [1, 0], [2, 1]),
    case("im2col.default", "without a batch", weights(4, 6, 5), [2, 2], [1, 1], [0, 0], [2, 2]),
    case("col2im.default", "overlapping", normal(12, 16), [5, 6], [2, 3], [1, 1], [0, 0], [1, 1], largest=18),
    case("col2im.default", "settings", normal(12, 6), [5, 6], [3, 2], [1, 2], [1, 0], [2, 2], largest=18),
    case("col2im.default", "without a batch", weights(12, 16), [5, 6], [2, 3], [1, 1], [0, 0], [1, 1], largest=18),
]  # fmt: skip


def resized(name: str, *align: bool, **bounds: float) -> list[Case]:
    """The same resizings in both spellings: to a size, by factors."""
    end = ", corners aligned" * any(align)
    return [
        *(case(f"{name}.vec", f"to {s}{end}", IMAGE, s, *align, None, **bounds) for s in ([12, 16], [9, 5], [6, 8], [1, 11])),
        *(case(f"{name}.vec", f"by {f}{end}", IMAGE, None, *align, f, **bounds) for f in ([2.0, 3.0], [1.7, 0.6], [2.3, 2.0])),
        *(case(f"{name}.default", f"to {s}{end}", IMAGE, s, *align, **bounds) for s in ([12, 8], [7, 20])
          if not name.startswith("_")),
        *(case(f"{name}.default", f"by {f}{end}", IMAGE, s, *align, *f, **bounds) for s, f in (([10, 4], [1.7, 0.6]),)
          if not name.startswith("_")),
    ]  # fmt: skip


CODES = whole(0, 256, 4, 6, 8, dtype=torch.uint8)  # torch resizes no int8
GRID = between(-1.2, 1.2, 5, 3, 2)
RESIZING = [
    case("upsample_nearest2d.vec", "codes doubled", CODES, None, [2.0, 2.0]),
    case("upsample_nearest2d.default", "codes by fractions", CODES, [9, 5]),
    *resized("upsample_nearest2d"),
    *resized("_upsample_nearest_exact2d"),
    case("upsample_nearest1d.vec", "doubled", SEQUENCE, None, [2.0]),
    case("upsample_nearest1d.vec", "fraction", SEQUENCE, [14], None),
    *[c for align in (False, True) for c in resized("upsample_bilinear2d", align, largest=6, ulps=8)],
    *[c for align in (False, True) for c in resized("upsample_bicubic2d", align, largest=6, ulps=8)],
    *[case("_upsample_bilinear2d_aa.default", f"to {size}{', corners aligned' * a}", IMAGE, size, a, largest=3, ulps=8)
      for a in (False, True) for size in ([12, 16], [3, 5], [1, 20])],
    case("upsample_bilinear2d.vec", "a factor that keeps the size", IMAGE, None, False, [1.1, 2.0], largest=6, ulps=8),
    case("upsample_bicubic2d.vec", "a factor that keeps the size", IMAGE, None, False, [1.1, 2.0], largest=6, ulps=8),
    case("upsample_bilinear2d.default", "one factor alone", IMAGE, [10, 4], False, 1.7, None, largest=6, ulps=8),
    case("upsample_bicubic2d.default", "factors that give another size", IMAGE, [11, 4], False, 1.7, 0.6, largest=6, ulps=8),
    case("upsample_linear1d.vec", "a factor that float32 rounds to another size", normal(2, 10), None, False, [0.7],
         largest=6, ulps=8),
    case("_upsample_bilinear2d_aa.default", "by factors", IMAGE, [4, 5], False, 0.7, 0.65, largest=3, ulps=8),
    case("upsample_linear1d.vec", "size", SEQUENCE, [14], False, None, largest=6, ulps=8),
    case("upsample_linear1d.vec", "factor, corners aligned", SEQUENCE, None, True, [1.7], largest=6, ulps=8),
    *[case("grid_sampler.default", f"{m}, {p}{', corners aligned' * a}", IMAGE, GRID, i, j, a, largest=6, ulps=8)
      for i, m in enumerate(("linear", "nearest", "cubic")) for j, p in enumerate(("zeros", "border", "reflection"))
      for a in (False, True)],
    case("grid_sampler.default", "volumes", VOLUME, between(-1, 1, 2, 3, 4, 3), 0, 0, False, largest=6, ulps=8),
]  # fmt: skip

LAYER_CASES = NORMS + PRODUCTS + CONVOLUTIONS + POOLING + RESIZING
