"""Arguments without an ONNX form, and what the error says."""

from __future__ import annotations

import torch

from tests.export.cases import case
from tests.export.element_cases import COUNTS, F64, WHOLE, X
from tests.export.layer_cases import BETA, GAMMA, HEADS, IMAGE
from tests.export.onnx_graphs import Constant, Given, Size, normal, whole
from tests.export.tensor_cases import TABLE

SQUARE = Given(lambda b, g: torch.randn(b, b, generator=g))
SORTED = Constant(torch.tensor([3.0, 1.0, 2.0]))

REFUSED = [
    (case("as_strided.default", "any", X, [2, 2], [1, 1]), "operator aten.as_strided.default has no ONNX form"),
    (case("_to_copy.default", "complex", X, dtype=torch.complex64), "type torch.complex64"),
    (case("dropout.default", "training", X, 0.5, True), "dropout: train=True"),
    (case("batch_norm.default", "training", IMAGE, GAMMA, BETA, None, None, True, 0.1, 1e-5, True), "batch_norm: training=True"),
    (case("_native_batch_norm_legit_no_training.default", "statistics", IMAGE, GAMMA, BETA, BETA,
          Constant(torch.ones(4)), 0.1, 1e-5), "saved statistics"),
    (case("scaled_dot_product_attention.default", "dropout", *HEADS, None, 0.5), "dropout_p > 0"),
    (case("scaled_dot_product_attention.default", "shared heads", normal(4, 5, 4), *HEADS[1:], enable_gqa=True), "enable_gqa"),
    (case("scaled_dot_product_attention.default", "causal batch", SQUARE, SQUARE, SQUARE, None, 0.0, True, scale=1.0),
     "length of a causal sequence depends on the batch size"),
    (case("pow.Tensor_Tensor", "integers", WHOLE, COUNTS), "pow of integers"),
    (case("hypot.default", "float64", normal(2, dtype=F64), normal(2, dtype=F64)), "hypot of float64"),
    (case("index_put.default", "mask with values", TABLE, [Constant(torch.tensor([1, 0, 0, 1, 0, 0]).bool())],
          Constant(torch.ones(2, 4))), "several values for the elements"),
    (case("index_put.default", "mask among indices", X, [None, Constant(torch.tensor([True, False, True]))],
          Constant(torch.tensor(1.0))), "a mask selects"),
    (case("searchsorted.Tensor", "sorter", SORTED, normal(4), sorter=Constant(torch.tensor([1, 2, 0]))), "sorter"),
    (case("roll.default", "batch", X, [1], [0]), "roll: .* depends on the batch size"),
    (case("unbind.int", "batch", X), "unbind: .* depends on the batch size"),
    (case("chunk.default", "batch", X, 2), "chunk: .* depends on the batch size"),
    (case("split.Tensor", "batch", X, 2), "split: .* depends on the batch size"),
    (case("linspace.default", "as many as the batch", 0, 1, Size()), "linspace: .* depends on the batch size"),
    (case("triu.default", "square of the batch", SQUARE), "triangle: .* depends on the batch size"),
    (case("repeat_interleave.self_int", "square of the batch", SQUARE, 2), "not a multiple of the batch size"),
    (case("arange.start_step", "fractions up to the batch", 0, Size(), 0.5), "arange: a fraction"),
    (case("max_pool2d.default", "window outside", normal(1, 1, 4), [2, 1], [1, 1], [1, 0], [2, 1]), "lies in the padding"),
    (case("_upsample_bilinear2d_aa.default", "to one column", IMAGE, [3, 1], False), "a width of 1"),
    (case("pad.default", "reflection that cuts", IMAGE, [-1, 2, 0, 0], "reflect"), "negative widths in mode 'reflect'"),
    (case("select_scatter.default", "batch", X, normal(3, 4, batched=False), 0, 0), "size of the dimension"),
    (case("topk.default", "as many as the batch", whole(0, 9, 9), Size()), "topk: k depends on the batch size"),
]  # fmt: skip
