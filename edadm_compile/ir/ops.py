"""The closed table of operators: every target a graph may call, in memory and in a file.

A name that is not here cannot be captured (the error names it) and cannot be loaded from a file, so an artifact
can never reach arbitrary code. All entries are pure functions of tensors and plain values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from edadm_compile.ir import schemas

#: Convolutions and matrix products with a constant weight: what gets quantized.
LAYER_OPS = {
    "aten.conv2d.default": "conv2d",
    "aten.conv_transpose2d.input": "conv_transpose2d",
    "aten.linear.default": "linear",
}

#: Operators that only move values (each output element is one input element or a pad of zero).
MOVEMENT_OPS = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "permute.default", "transpose.int", "t.default",
        "contiguous.default", "clone.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "squeeze.default",
        "flatten.using_ints", "unflatten.int", "expand.default", "slice.Tensor", "select.int", "alias.default",
        "upsample_nearest2d.vec", "upsample_nearest2d.default", "pixel_shuffle.default", "pixel_unshuffle.default",
        "repeat.default", "constant_pad_nd.default", "pad.default", "movedim.int", "movedim.intlist",
        "repeat_interleave.self_int", "roll.default", "flip.default", "expand_as.default", "view_as.default",
        "swapaxes.default", "dropout.default", "unbind.int", "chunk.default", "split.Tensor",
        "split_with_sizes.default", "lift_fresh_copy.default", "detach.default",
    )
)  # fmt: skip

_ELEMENTWISE = (
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor", "mul.Tensor", "mul.Scalar",
    "div.Tensor", "div.Scalar", "div.Tensor_mode", "neg.default", "abs.default", "exp.default", "exp2.default",
    "log.default", "log2.default", "log1p.default", "expm1.default", "sqrt.default", "rsqrt.default",
    "reciprocal.default", "square.default", "pow.Tensor_Scalar", "pow.Scalar", "pow.Tensor_Tensor", "sin.default",
    "cos.default", "tan.default", "tanh.default", "sigmoid.default", "silu.default", "gelu.default", "relu.default",
    "relu6.default", "leaky_relu.default", "elu.default", "selu.default", "celu.default", "mish.default",
    "softplus.default", "hardtanh.default", "hardswish.default", "hardsigmoid.default", "prelu.default",
    "logsigmoid.default", "log_sigmoid.default", "softsign.default", "erf.default", "clamp.default", "clamp_min.default",
    "clamp_max.default", "clamp.Tensor", "minimum.default", "maximum.default", "where.self", "where.ScalarOther",
    "where.ScalarSelf", "where.Scalar", "floor.default", "ceil.default", "round.default", "sign.default", "addcmul.default", "addcdiv.default",
    "lerp.Tensor", "lerp.Scalar", "masked_fill.Scalar", "masked_fill.Tensor", "eq.Scalar", "eq.Tensor", "ne.Scalar",
    "ne.Tensor", "lt.Scalar", "lt.Tensor", "le.Scalar", "le.Tensor", "gt.Scalar", "gt.Tensor", "ge.Scalar",
    "ge.Tensor", "logical_not.default", "logical_and.default", "logical_or.default", "bitwise_not.default",
    "bitwise_and.Tensor", "bitwise_or.Tensor", "remainder.Scalar", "remainder.Tensor", "fmod.Scalar", "floor_divide.default", "_to_copy.default",
    "to.dtype", "to.dtype_layout", "to.device", "type_as.default", "float_power.Tensor_Scalar", "threshold.default",
    "atan2.default", "hypot.default", "isnan.default", "nan_to_num.default", "glu.default",
)  # fmt: skip
_NORMS = (
    "group_norm.default", "native_group_norm.default", "layer_norm.default", "native_layer_norm.default",
    "batch_norm.default", "_native_batch_norm_legit_no_training.default", "instance_norm.default", "rms_norm.default",
    "linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar", "normalize.default", "_weight_norm.default",
)  # fmt: skip
_REDUCTIONS = (
    "mean.default", "mean.dim", "sum.default", "sum.dim_IntList", "amax.default", "amin.default", "var.correction",
    "var_mean.correction", "var.dim", "std.correction", "std.dim", "cumsum.default", "prod.dim_int",
    "softmax.int", "_softmax.default", "log_softmax.int", "logsumexp.default", "argmax.default", "topk.default",
    "max.default", "min.default", "all.default", "any.default",
)  # fmt: skip
_MATMUL = (
    "mm.default", "bmm.default", "matmul.default", "addmm.default", "baddbmm.default", "einsum.default", "outer.default",
    "mul.Tensor", "scaled_dot_product_attention.default", "conv1d.default", "conv3d.default", "conv1d.padding", "conv2d.padding",
    "conv_transpose1d.default", "convolution.default", "bilinear.default",
)  # fmt: skip
_POOL_RESIZE = (
    "avg_pool2d.default", "max_pool2d.default", "adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default",
    "adaptive_max_pool2d.default", "avg_pool1d.default", "max_pool2d_with_indices.default",
    "upsample_bilinear2d.vec", "upsample_bilinear2d.default", "upsample_bicubic2d.vec", "upsample_bicubic2d.default",
    "upsample_linear1d.vec", "upsample_nearest1d.vec", "upsample_nearest_exact2d.vec", "_upsample_nearest_exact2d.vec",
    "_upsample_bilinear2d_aa.default", "reflection_pad2d.default",
    "replication_pad2d.default", "grid_sampler.default", "unfold.default", "im2col.default", "col2im.default",
)  # fmt: skip
_CREATE_INDEX = (
    "cat.default", "stack.default", "embedding.default", "index.Tensor", "index_select.default", "gather.default",
    "one_hot.default", "arange.default", "arange.start", "arange.start_step", "full.default", "full_like.default",
    "zeros.default", "ones.default", "zeros_like.default", "ones_like.default", "empty_like.default", "new_zeros.default",
    "new_ones.default", "new_full.default", "scalar_tensor.default", "linspace.default", "tril.default", "triu.default",
    "meshgrid.indexing", "sym_size.int", "select_scatter.default", "slice_scatter.default", "copy.default",
    "broadcast_to.default", "numel.default", "cdist.default", "bucketize.Tensor", "searchsorted.Tensor", "index_put.default",
    "scatter.src", "scatter.value", "diagonal.default", "as_strided.default", "hstack.default", "concat.default",
)  # fmt: skip

_OPERATORS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        "getitem",
        "add",
        "sub",
        "mul",
        "floordiv",
        "truediv",
        "neg",
        "mod",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
    )
}

#: ``edadm::`` operators by dialect.
QDQ_OPS = frozenset(f"edadm.{n}.default" for n in ("quantize", "dequantize", "dequantize_weight"))
LOWERED_OPS = frozenset(
    f"edadm.{n}.default" for n in ("quantize", "dequantize", "qconv2d", "qconv_transpose2d", "qlinear", "qmatmul")
)
FLOAT_OPS = (
    frozenset(f"aten.{n}" for n in (*_ELEMENTWISE, *_NORMS, *_REDUCTIONS, *_MATMUL, *_POOL_RESIZE, *_CREATE_INDEX))
    | MOVEMENT_OPS
    | frozenset(LAYER_OPS)
    | frozenset(_OPERATORS)
)


@cache
def resolve(name: str) -> Callable[..., Any]:
    """The callable behind a table name such as ``aten.conv2d.default``.

    Raises:
        KeyError: `name` is not in the table, or this torch version does not have it.
    """
    assert schemas.LIBRARY is not None  # the edadm schemas are registered by importing the module
    if name in _OPERATORS:
        return _OPERATORS[name]
    if name not in FLOAT_OPS and name not in QDQ_OPS and name not in LOWERED_OPS:
        raise KeyError(name)
    namespace, packet, overload = name.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)  # type: ignore[no-any-return]
    except AttributeError:
        raise KeyError(name) from None


def op_name(target: Any) -> str:
    """Table name of an fx target: ``aten.silu.default``, ``operator.mul``, else the target's own text."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", str(target))
    if getattr(target, "__module__", "") in ("_operator", "operator"):
        return f"operator.{name}"
    return str(name)
