"""Attention: one fused kernel for the library operator and for its decomposed integer form.

1. scaled_dot_product_attention(q, k, v) without mask → attention_float
2. qmatmul(q, kᵀ) → softmax → quantize → qmatmul(·, v) → attention, exact mode: the same codes as the four operators
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edadm_compile.ir.ops import op_name
from edadm_compile.kernels.attention import MAX_HEAD
from edadm_compile.kernels.launch import Launch, Operand
from edadm_compile.lowering.builder import present
from edadm_compile.lowering.codes import code_range, post_of
from edadm_compile.lowering.groups import QUANTIZE, Group

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner

_SDPA, _PRODUCT = "aten.scaled_dot_product_attention.default", "edadm.qmatmul.default"
#: Views between codes and their quantizer.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass
class AttentionGroup(Group):
    """One attention: operands as graph nodes, constants of the launch, parameters of the integer form."""

    q: Any = None
    k: Any = None
    v: Any = None
    keys_last: bool = False
    kernel: str = "attention_float"
    constants: dict[str, Any] = field(default_factory=dict)
    params: Operand | None = None


def start(planner: Planner, node: fx.Node) -> bool:
    """Open a group if `node` begins an attention that a kernel computes."""
    name = op_name(node.target)
    if name == _SDPA and node.meta["val"].dtype == torch.float32 and not planner.build.target.library_attention:
        return _start_float(planner, node)
    return name == _PRODUCT and _start_codes(planner, node)


def _heads(operand: Any, keys_last: bool = False) -> Operand | None:
    """A view [B, L, HEADS, D] of [B, HEADS, L, D] or [B, L, D] (`keys_last`: L and D exchanged); None if D is not contiguous."""
    if not isinstance(operand, Operand):
        return None
    shape, strides = list(operand.shape), list(operand.strides)
    if keys_last:
        shape[-1], shape[-2], strides[-1], strides[-2] = shape[-2], shape[-1], strides[-2], strides[-1]
    if len(shape) == 3:
        shape.insert(1, 1)
        strides.insert(1, 0)
    if len(shape) != 4 or strides[3] != 1 or shape[3] > MAX_HEAD:
        return None
    return replace(
        operand,
        shape=(shape[0], shape[2], shape[1], shape[3]),
        strides=(strides[0], strides[2], strides[1], strides[3]),
    )


def _open(planner: Planner, group: AttentionGroup) -> bool:
    planner.hold(group)
    return True


def _result(planner: Planner, node: fx.Node, heads: Operand) -> Operand:
    """Where the result lies: heads of one token side by side, whatever the order of dimensions of `node`."""
    _, length, count, size = heads.shape
    shape = tuple(node.meta["val"].shape)
    strides = (length * count * size, size, count * size, 1) if len(shape) == 4 else (length * size, size, 1)
    return planner.build.buffer(shape, planner.build.target.store, node.name, strides)


def _start_float(planner: Planner, node: fx.Node) -> bool:
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:6], strict=False)) | dict(node.kwargs)
    if any(given.get(n) for n in ("dropout_p", "is_causal", "enable_gqa")) or given.get("attn_mask") is not None:
        return False
    if set(given) - set(names) or len(node.args) > 6:
        return False
    q, k, v = node.args[:3]
    views = [_heads(planner.values.get(n)) for n in (q, k, v)]
    if any(w is None or w.dtype not in _FLOATS for w in views) or views[0].shape[2] != views[1].shape[2]:  # type: ignore[union-attr]
        return False
    assert views[0] is not None
    scale = given.get("scale") or 1 / math.sqrt(views[0].shape[3])
    out = _result(planner, node, views[0])
    info = node.meta.get("layer")
    label = info.name if info else node.name
    return _open(planner, AttentionGroup(node, out, out, 0, [label], q, k, v, constants={"SCALE": scale}))


def _only(node: fx.Node, name: str) -> fx.Node | None:
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and user.op == "call_function" and op_name(user.target) == name else None


def _start_codes(planner: Planner, node: fx.Node) -> bool:
    softmax = _only(node, "aten.softmax.int")
    codes = (
        _only(softmax, QUANTIZE)
        if softmax is not None and softmax.args[1] in (-1, node.meta["val"].dim() - 1)
        else None
    )
    product = _only(codes, _PRODUCT) if codes is not None and int(codes.args[3]) <= 8 else None  # type: ignore[arg-type]
    if softmax is None or codes is None or product is None or product.args[0] is not codes:
        return False
    views = (
        _heads(planner.values.get(node.args[0])), _heads(planner.values.get(node.args[1]), True),
        _heads(planner.values.get(product.args[1])),
    )  # fmt: skip
    value_scale = _scale_of(product.args[1])
    if any(v is None for v in views) or value_scale is None:
        return False
    sources = [str(n.target) for n in (node.args[2], value_scale, codes.args[1], codes.args[2])]  # type: ignore[union-attr]
    zero_q, zero_k, zero_v = (int(a) for a in (node.args[3], node.args[4], product.args[4]))  # type: ignore[arg-type]
    params = planner.build.constant(
        sources, "attention", (7,), torch.float32, zero_q=zero_q, zero_k=zero_k, zero_v=zero_v
    )
    for inner in (node, softmax, codes):
        planner.values[inner] = None
    ranges = code_range(codes)
    constants = {
        "P_CODES": True, "PMIN": ranges["QMIN"], "PMAX": ranges["QMAX"],
        "ZERO_Q": zero_q != 0, "ZERO_K": zero_k != 0, "ZERO_V": zero_v != 0,
    }  # fmt: skip
    assert views[0] is not None
    out = _result(planner, product, views[0])
    names = [info.name for n in (node, product) if (info := n.meta.get("layer"))]
    return _open(planner, AttentionGroup(
        product, out, out, 0, names, node.args[0], node.args[1], product.args[1], True, "attention", constants, params
    ))  # fmt: skip


def _scale_of(node: Any) -> fx.Node | None:
    """The scale constant of codes, found through the views between them and their quantizer."""
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node.target) != QUANTIZE:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    return node.args[1]  # type: ignore[return-value]


def emit(planner: Planner, group: AttentionGroup) -> None:
    """Append the launch of an attention group, with the quantizer that follows it."""
    views = {
        "q": _heads(planner.operand(group.q)), "k": _heads(planner.operand(group.k), group.keys_last),
        "v": _heads(planner.operand(group.v)),
    }  # fmt: skip
    assert views["q"] is not None and views["k"] is not None
    batch, queries, heads, size = views["q"].shape
    constants: dict[str, Any] = {
        "LQ": queries, "LK": views["k"].shape[1], "HEADS": heads, "D": size, "EXACT": planner.build.target.exact,
        "ASM": bool(planner.build.target.arch), **group.constants,
    }  # fmt: skip
    for role, view in views.items():
        assert view is not None
        constants |= {f"{role.upper()}_{n}": s for n, s in zip(("BATCH", "ROW", "HEAD"), view.strides, strict=False)}
    need_out, codes = planner.outputs_of(group)
    if codes is not None and heads * size % 16:
        need_out, codes = True, None
    flat = {"shape": (batch, queries, heads * size), "strides": (queries * heads * size, heads * size, 1)}
    operands: dict[str, Operand | None] = {**views, "params": group.params}
    constants |= {"OUT": need_out, "OUT_STRIDE": heads * size if need_out else 0, "OUT_Q": codes is not None}
    if need_out:
        operands["out"] = replace(group.base, **flat)  # type: ignore[arg-type]
    if codes is not None:
        out_q = planner.build.buffer(group.base.shape, torch.int8, codes.name, group.base.strides)
        planner.values[codes] = out_q
        operands |= {"out_q": replace(out_q, **flat), "post": post_of(planner, codes)}  # type: ignore[arg-type]
        constants |= {"OUT_Q_STRIDE": heads * size, **code_range(codes)}
    writes = tuple(role for role in ("out", "out_q") if role in operands)
    tile = planner.build.tile(group.kernel, constants | {"batch": batch})
    planner.build.launch(
        Launch(group.kernel, "+".join(group.names), present(operands), constants, {"batch": batch}, tile, writes)
    )
