"""Where the time of a compiled file goes: measured by node in ONNX Runtime, else multiply-accumulates."""

from __future__ import annotations

from typing import Any

from edadm_compile.driver import bench_inputs
from edadm_compile.driver.machine import processor
from edadm_compile.errors import EdadmError
from edadm_compile.export.convert import Exported, ExportedLayer, convert
from edadm_compile.export.targets import target
from edadm_compile.ir.analysis import fake_values
from edadm_compile.ir.arithmetic import layer_multiplications, value_counted
from edadm_compile.ir.program import Program, layer_of
from edadm_compile.runtime.artifact import Artifact
from edadm_compile.runtime.engines.node_times import NodeTime, node_times
from edadm_compile.runtime.engines.onnxruntime import missing_packages

#: Different inputs that the calls take in turn.
_RING = 4


def layer_times(loaded: Artifact, seed: int = 0) -> dict[str, Any]:
    """Time by layer on this machine, and the multiply-accumulates behind it.

    Returns:
        ``kind`` ("measured" or "model"), ``what`` (a sentence), ``layers`` (microseconds by name; empty when not
        measured), ``between`` (microseconds by operator of what is between layers), ``macs`` (by name, for one image).
    """
    macs = multiply_accumulates(loaded.lowered)
    reason = missing_packages()
    if reason:
        reason = f"{reason} not installed (pip install 'edadm-compile[onnx]')"
    else:
        try:
            return {**_measured(loaded, seed), "macs": macs}
        except EdadmError as error:
            reason = str(error)
    what = f"Cost model, not time: multiply-accumulates for one image. ONNX Runtime did not measure: {reason}"
    return {"kind": "model", "what": what, "layers": {}, "between": {}, "macs": macs}


def _measured(loaded: Artifact, seed: int) -> dict[str, Any]:
    exported: Exported = convert(loaded.qdq, target("cpu"))
    batch = loaded.qdq.signature.min_batch
    inputs = bench_inputs.draw(loaded.lowered, batch, _RING, seed)
    times = node_times(exported, [[v[:batch] for v in row] for row in inputs])
    layers, taken = {}, set()
    for layer in exported.layers:
        nodes = _nodes_of(layer, times)
        if nodes:
            taken |= set(nodes)
            layers[layer.info.name] = sum(times[n].microseconds for n in nodes)
    between: dict[str, float] = {}
    for name, found in times.items():
        if name not in taken:
            between[found.operator] = between.get(found.operator, 0.0) + found.microseconds
    images = "one image" if batch == 1 else f"a batch of {batch}"
    what = (
        f"Measured with the profiler of ONNX Runtime on one thread of {processor()}, {images} in one call, median of up "
        "to 20 calls. The product of each layer is its own; what is between layers is summed by operator."
    )
    return {"kind": "measured", "what": what, "layers": layers, "between": dict(sorted(between.items()))}


def _nodes_of(layer: ExportedLayer, times: dict[str, NodeTime]) -> list[str]:
    """Nodes of the executed graph that are a layer's products; fusions and layouts append to their names."""
    return [
        node
        for node in times
        if any(node in (name, f"{name}_nchwc") or node.startswith(f"{name}/") for name in layer.products)
    ]


def multiply_accumulates(program: Program) -> dict[str, int]:
    """Multiply-accumulates of each layer with a weight for one image, by name; from shapes, nothing runs."""
    values = fake_values(program, program.signature.min_batch)  # a program from a file has no recorded shapes
    return {
        info.name: int(layer_multiplications(values[value_counted(node)].shape, info.weight_shape))
        for node in values
        if (info := layer_of(node)) and info.weight_shape
    }
