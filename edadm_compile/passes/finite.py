"""Parameters that are not finite are refused before anything is computed with them."""

from __future__ import annotations

from torch import fx

from edadm_compile.calibration.diagnosis import where
from edadm_compile.errors import CalibrationError
from edadm_compile.ir.analysis import is_layer
from edadm_compile.ir.program import Program, get_constant


def check_parameters(program: Program) -> None:
    """Refuse NaN in any constant that is read, and infinities in weights of layers (a mask may well hold them).

    Raises:
        CalibrationError: naming the tensor, the layer that reads it, and how many values are broken.
    """
    for node in program.graph_module.graph.nodes:
        if node.op != "get_attr" or not node.users:
            continue
        value = get_constant(program.graph_module, str(node.target))
        if not value.is_floating_point():
            continue
        broken = ~value.isfinite() if _is_weight(node) else value.isnan()
        if count := int(broken.sum()):
            raise CalibrationError(
                f"weight {node.target} of {where(next(iter(node.users)))} holds NaN or infinite values: {count} of "
                f"{value.numel()}; the checkpoint is broken: save it again, or take an earlier one"
            )


def _is_weight(node: fx.Node) -> bool:
    """Whether a layer computes with the constant."""
    return any(is_layer(user) for user in node.users)
