"""Attention: one fused kernel for the library operator and for its decomposed integer form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from edadm_compile.lowering.planner import Planner


def emit(planner: Planner, node: fx.Node) -> bool:
    """Emit an attention launch for `node` if a kernel computes it."""
    return False
