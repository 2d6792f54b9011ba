"""Quantize nodes as the kernels see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from edadm_compile.kernels.launch import Operand
from edadm_compile.quant.spec import act_spec

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner


def code_range(codes: fx.Node) -> dict[str, int]:
    """QMIN and QMAX of a quantize node."""
    spec = act_spec(int(codes.args[3]), bool(codes.args[4]))  # type: ignore[arg-type]
    return {"QMIN": spec.qmin, "QMAX": spec.qmax}


def post_of(planner: Planner, codes: fx.Node) -> Operand:
    """Scale, zero point and 1/scale of a quantize node as the kernels read them."""
    names = [str(codes.args[i].target) for i in (1, 2)]  # type: ignore[union-attr]
    return planner.build.constant(names, "post", (3,), torch.float32)
