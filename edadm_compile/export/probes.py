"""The same graph with the borders of its layers as outputs, for comparison layer by layer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from edadm_compile.export.convert import Exported
from edadm_compile.export.files import needs_external_data


def borders(exported: Exported) -> dict[ir.Value, ir.DataType]:
    """Input codes and results of all integer layers, with their types."""
    kind = ir.DataType.INT8 if exported.target.signed else ir.DataType.UINT8
    watched: dict[ir.Value, ir.DataType] = {}
    for layer in exported.layers:
        for index, value in enumerate(layer.codes):
            signed = layer.info.kind == "matmul" and index == 1
            watched[value] = ir.DataType.INT8 if signed else kind
        if layer.output is not None:
            watched[layer.output] = kind if layer.quantizer is not None else ir.DataType.FLOAT
    return watched


def save_probed(exported: Exported, path: Path) -> None:
    """Write the graph with its borders as further outputs.

    Float values inside a pattern as outputs would change what ONNX Runtime fuses; codes and results of layers do not.
    """
    outputs = exported.model.graph.outputs
    count = len(outputs)
    try:
        for value, kind in borders(exported).items():
            value.type = ir.TensorType(kind)
            outputs.append(value)
        ir.save(
            exported.model, path, external_data=f"{path.name}.data" if needs_external_data(exported.model) else None
        )
    finally:
        del outputs[count:]
