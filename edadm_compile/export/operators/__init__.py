"""ONNX forms of operators: one table per file, by operator name; the float ones merged in `FLOAT_TABLE`."""

from __future__ import annotations

from edadm_compile.export.operators import (
    activations,
    arithmetic,
    convolutions,
    creation,
    elementwise,
    indexing,
    movement,
    norms,
    pooling,
    powers,
    products,
    rearrangement,
    reductions,
    resize,
)
from edadm_compile.export.scope import Emitter

#: Emitters of the operators in `edadm_compile.ir.ops.FLOAT_OPS`. Plain numbers (sizes and what is computed from them)
#: are known to `Scope` and need none.
FLOAT_TABLE: dict[str, Emitter] = {
    name: emitter
    for part in (
        elementwise, arithmetic, powers, activations, movement, rearrangement, creation, indexing, reductions, norms,
        products, convolutions, pooling, resize,
    )
    for name, emitter in part.TABLE.items()
}  # fmt: skip
