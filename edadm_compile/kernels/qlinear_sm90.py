"""Integer linear layer for sm_90 alone; see `edadm_compile.kernels.qconv2d_sm90`.

Formula, roles, scalars and constants of `edadm_compile.kernels.qlinear`, and the tile size STAGES.
"""

from __future__ import annotations

import dataclasses

from edadm_compile.kernels import qconv2d_sm90, qlinear
from edadm_compile.kernels.launch import Tile
from edadm_compile.kernels.qconv2d_sm90 import supports
from edadm_compile.kernels.registry import Values

__all__ = ["KERNEL", "candidates", "supports"]

KERNEL = dataclasses.replace(
    qlinear.KERNEL,
    name="qlinear_sm90",
    sizes=qconv2d_sm90.KERNEL.sizes,
    entry="edadm_compile.kernels.gluon.qlinear:qlinear_sm90",
)


def candidates(values: Values) -> list[Tile]:
    """Tiles worth measuring; none for a launch that needs the portable kernel."""
    return qconv2d_sm90.candidates({**qlinear.KERNEL.constants, **values})
