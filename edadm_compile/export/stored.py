"""Weights of quantized layers as an exported graph stores them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from edadm_compile.export.convert import Exported, ExportedLayer


def stored_weights(exported: Exported) -> dict[str, Any]:
    """Stored weights of quantized layers: codes, scales and zero points, against float32.

    Returns:
        ``layers``: count by type, a layer of several products (the phases of an image) once; ``bytes``, ``float32_bytes``
        and their ``ratio``. Equal constants, which are stored once, count once in ``bytes`` and for each layer in
        ``float32_bytes``.
    """
    nodes = {str(node.name): node for node in exported.model.graph}
    layers = {"int4": 0, "int8": 0}
    sizes: dict[str, int] = {}
    float32 = 0
    for layer in exported.layers:
        found = _constants(layer, nodes)
        if not found:
            continue  # a float layer, a product of two activations, or nothing is left of it
        types = {codes.const_value.dtype for codes, _ in found}  # type: ignore[union-attr]
        layers["int4" if types == {ir.DataType.INT4} else "int8"] += 1
        for codes, scale in found:
            assert codes.const_value is not None and scale.const_value is not None
            float32 += 4 * codes.const_value.size
            sizes[str(codes.name)] = codes.const_value.nbytes
            sizes[f"{codes.name} by {scale.name}"] = (
                5 * scale.const_value.size
            )  # a float32 scale and an int8 zero point
    stored = sum(sizes.values())
    return {"layers": layers, "bytes": stored, "float32_bytes": float32, "ratio": round(stored / max(float32, 1), 4)}


def _constants(layer: ExportedLayer, nodes: dict[str, ir.Node]) -> list[tuple[ir.Value, ir.Value]]:
    """(codes, scale) of a layer's weight, for each of its products that has one of its own.

    Names would not do: a layer may be called like anything else in the graph, and equal constants share one name.
    """
    found: list[tuple[ir.Value, ir.Value]] = []
    for name in layer.products:
        inputs = nodes[name].inputs if name in nodes else ()
        value = inputs[1] if len(inputs) > 1 else None
        while value is not None and (producer := value.producer()) is not None and producer.op_type in _BETWEEN:
            if producer.op_type == "DequantizeLinear":
                pair = (_uncast(producer.inputs[0]), producer.inputs[1])
                if all(v is not None and v.const_value is not None for v in pair) and pair not in found:
                    found.append(pair)  # type: ignore[arg-type]
                break
            value = producer.inputs[0]
    return found


#: What may stand between a constant weight and its product.
_BETWEEN = ("DequantizeLinear", "Transpose", "Reshape")


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """The INT4 constant behind its Cast to INT8, and the factor that there may be."""
    while value is not None and (producer := value.producer()) is not None and producer.op_type in ("Cast", "Mul"):
        value = producer.inputs[0]
    return value
