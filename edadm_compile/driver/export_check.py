"""An exported graph in ONNX Runtime: what runs in integers, and how far from the reference engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from edadm_compile.driver.export_following import Following, signed_codes
from edadm_compile.driver.export_probing import Probed, other_timestep
from edadm_compile.evaluate.metrics import finite, sqnr
from edadm_compile.export.convert import OUTPUT, Exported, ExportedLayer
from edadm_compile.export.optimized import INTEGER_OPS, OptimizedGraph
from edadm_compile.export.targets import OnnxTarget
from edadm_compile.ir.program import Program, get_constant, layer_of
from edadm_compile.quant import affine
from edadm_compile.quant.spec import act_spec
from edadm_compile.runtime.engines.reference import ReferenceEngine

#: Largest difference of output codes, and of float outputs relative to the largest value of the layer's output.
CODE_STEPS, FLOAT_ERROR = 1, 2.0**-18
#: Further relative difference in a float time path: the sine of a thousand radians has ten bits less than its argument.
SINES = 2.0**-13


@dataclass(frozen=True)
class Check:
    """One exported graph under examination.

    Attributes:
        exported: the graph.
        lowered: the program of integer operators, which says what is right.
        inputs: x, t, conditions of a few states.
    """

    exported: Exported
    lowered: Program
    inputs: Sequence[Tensor]

    def run(self) -> dict[str, Any]:
        """Load the graph in ONNX Runtime, compare every layer and the output.

        Returns:
            counts of layers in integers, one row per layer, end-to-end figures, and ``broken``: sentences, empty when
            all layers agree.
        """
        with tempfile.TemporaryDirectory(prefix="edadm-") as folder:
            probed = Probed(self.exported, Path(folder))
            values, elsewhere = probed.run(self._inputs()), self._elsewhere(probed)
        optimized = probed.optimized
        between = Following(self.exported, values, layers_too=not self.exported.target.output_codes)
        behind = between.run(self._inputs())
        found = [self._row(layer, optimized, values) for layer in self.exported.layers]
        rows = [r for r in found if r is not None]
        for row in rows:
            _add_distances(row, between)
        prediction = torch.from_numpy(values[OUTPUT])
        reference = ReferenceEngine(self.lowered)(*self.inputs)
        return {
            "counts": _counts(rows),
            "operators": dict(sorted(optimized.counts.items())),
            "layers": rows,
            "end_to_end": self._ends(prediction, reference),
            "broken": [f"layer {r['layer']}: {r['failure']}" for r in rows if r["failure"]]
            + ([f"the prediction: {behind.failure}"] if behind.failure else [])
            + elsewhere
            + [f"{name} multiplies types that have no fast kernel" for name in self._slow(optimized)],
        }

    def _elsewhere(self, probed: Probed) -> list[str]:
        """What is wrong at a timestep that is not in the tables, for which the graph has another branch."""
        t = other_timestep(self.exported.prepared)
        if t is None:
            return []
        images = self.exported.prepared.signature.min_batch  # one, unless capture had to fix the batch
        inputs = [v[:images].clone() for v in self._inputs()]
        inputs[1] = torch.full_like(inputs[1], t)
        between = Following(self.exported, probed.run(inputs), further=SINES)
        failures = {"the prediction": between.run(inputs)} | {f"layer {n}": d for n, d in between.inputs.items()}
        return [f"{where} at timestep {t:g}: {d.failure}" for where, d in failures.items() if d.failure]

    def _ends(self, prediction: Tensor, reference: Tensor) -> dict[str, float | None]:
        return {
            "sqnr_to_reference_db": finite(sqnr(reference, prediction)),
            "largest_error": float((prediction - reference).abs().max()),
            "largest_value": float(reference.abs().max()),
        }

    def _slow(self, optimized: OptimizedGraph) -> tuple[str, ...]:
        return optimized.slow if self.exported.target.name == "cpu" else ()

    def _inputs(self) -> list[Tensor]:
        """`inputs` in the types of the captured model: samplers hand integers to models of continuous time too."""
        return [v.to(s.dtype) for s, v in zip(self.exported.prepared.signature.inputs, self.inputs, strict=True)]

    def _row(self, layer: ExportedLayer, optimized: OptimizedGraph, values: dict[str, Any]) -> dict[str, Any] | None:
        if not layer.products and layer.info.kind != "attention":
            return None  # nothing of it is left at run time
        operators = [_operator(name, optimized) for name in layer.products]
        integer = bool(operators) and all(op in INTEGER_OPS for op in operators)
        row: dict[str, Any] = {
            "layer": layer.info.name, "kind": layer.info.kind, "weights": layer.info.weight_bits,
            "operators": operators, "integer": integer, "why": "" if integer else self._why(layer, operators),
            "output": "codes" if layer.quantizer is not None else "float", "input_error": None, "error": None, "failure": "",
        }  # fmt: skip
        if layer.output is not None and self.exported.target.output_codes:
            row |= self._compare(layer, values)
        return row

    def _why(self, layer: ExportedLayer, operators: list[str]) -> str:
        if layer.info.weight_bits == 32:
            return layer.info.note
        target: OnnxTarget = self.exported.target
        if target.name != "cpu":
            return f"written for {target.name}; ONNX Runtime on this machine runs {', '.join(operators)}"
        return f"ONNX Runtime did not fuse it: {', '.join(operators)}"

    def _compare(self, layer: ExportedLayer, values: dict[str, Any]) -> dict[str, Any]:
        assert layer.output is not None
        codes = [signed_codes(values[str(v.name)]) for v in layer.codes]
        truth = (
            _product(self.exported.prepared, layer, codes) if layer.info.kind == "matmul" else self._layer(layer, codes)
        )
        found = values[str(layer.output.name)]
        if layer.quantizer is None:
            scale = float(truth.abs().max()) or 1.0
            error = float((torch.from_numpy(found) - truth).abs().max()) / scale
            allowed = FLOAT_ERROR + 0.5 * self._accumulator_unit(layer) / scale  # the bias is rounded to a unit
            failure = "" if error <= allowed else f"output differs by {error:.1e} of its largest value"
            return {"error": error, "failure": failure}
        wanted = self._quantized(layer.quantizer, truth).int()
        if layer.pixels is not None:
            wanted = torch.nn.functional.pad(torch.pixel_shuffle(wanted, 2), [-1, -1, -1, -1])
        steps = (signed_codes(values[str(layer.output.name)]).int() - wanted).abs()
        most = int(steps.max())
        failure = "" if most <= CODE_STEPS else f"output codes differ by up to {most} steps"
        return {"error": most, "differing_share": float((steps > 0).float().mean()), "failure": failure}

    def _twin(self, layer: ExportedLayer) -> fx.Node:
        """The layer in the program of integer operators."""
        nodes: list[fx.Node] = list(self.lowered.graph_module.graph.nodes)
        return next(n for n in nodes if (i := layer_of(n)) and i.name == layer.info.name)

    def _accumulator_unit(self, layer: ExportedLayer) -> float:
        """What one unit of a layer's int32 sums is worth: the largest ``s_x s_w``."""
        multiplier = self._twin(layer).args[2]
        return float(get_constant(self.lowered.graph_module, str(multiplier.target)).max())  # type: ignore[union-attr]

    def _layer(self, layer: ExportedLayer, codes: list[Tensor]) -> Tensor:
        """Float result of the reference kernel on the codes that ONNX Runtime had."""
        twin = self._twin(layer)
        x_q = codes[0] if len(codes) == 1 else (codes[0].to(torch.int16) * 256 + codes[1].to(torch.int16))
        if layer.moved is not None:
            x_q = layer.moved.target(x_q, *layer.moved.args[1:])  # type: ignore[operator]
        module = self.lowered.graph_module
        constants = [get_constant(module, str(a.target)) for a in twin.args[1:4]]  # type: ignore[union-attr]
        result: Tensor = twin.target(x_q, *constants, *twin.args[4:])  # type: ignore[operator]
        return result

    def _quantized(self, quantizer: fx.Node, value: Tensor) -> Tensor:
        module = self.exported.prepared.graph_module
        scale, zero = (get_constant(module, str(a.target)) for a in quantizer.args[1:3])  # type: ignore[union-attr]
        spec = act_spec(int(quantizer.args[3]), bool(quantizer.args[4]))  # type: ignore[arg-type]
        return affine.quantize(value, scale, zero, spec.qmin, spec.qmax)


def _product(prepared: Program, layer: ExportedLayer, codes: list[Tensor]) -> Tensor:
    """Exact product of two activations, without the number that may follow it."""
    module = prepared.graph_module
    terms = []
    for value, dequantize in zip(codes, layer.node.args[:2], strict=True):
        scale, zero = (get_constant(module, str(a.target)).double() for a in dequantize.args[1:3])  # type: ignore
        terms.append((value.double() - zero) * scale)
    return (terms[0] @ terms[1]).float()


def _add_distances(row: dict[str, Any], between: Following) -> None:
    """Put what following the program has found about a layer into its row; what is in front of it comes first."""
    name = row["layer"]
    if name in between.inputs:
        row["input_error"] = between.inputs[name].error
    if name in between.outputs:
        row["error"] = between.outputs[name].error
    found = [d[name].failure for d in (between.inputs, between.outputs) if name in d]
    row["failure"] = "; ".join(f for f in (*found, row["failure"]) if f)


def _operator(name: str, optimized: OptimizedGraph) -> str:
    """Operator of a node, also where fusions, or the layout of float convolutions, appended to its name."""
    for known in (name, f"{name}_nchwc"):
        if known in optimized.operators:
            return optimized.operators[known]
    return next((op for found, op in optimized.operators.items() if found.startswith(f"{name}/")), "fused away")


def _counts(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        entry = counts.setdefault(row["kind"], {"integer": 0, "float": 0})
        entry["integer" if row["integer"] else "float"] += 1
    return dict(sorted(counts.items()))
