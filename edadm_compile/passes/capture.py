"""Capture: an eager module to an exported program with a free batch dimension."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from edadm_compile.errors import CaptureError
from edadm_compile.ir.ops import op_name
from edadm_compile.ir.program import Signature

#: Largest batch tried when capturing with a free batch dimension.
MAX_BATCH = 1024
#: Operators whose result equals their input.
_COPIES = ("aten.contiguous.default", "aten.clone.default")


class CallAdapter(nn.Module):
    """Calls a model the canonical way, ``(x, t, *conditions)``, and returns the predicted-noise tensor.

    Args:
        model: the source module.
        names: forward parameter names of the conditions; x and t are passed by position.
        fixed: further keyword arguments passed as they are (for example ``return_dict=False``).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], fixed: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self._names = tuple(names)
        self._fixed = dict(fixed or {})

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """X [B, ...], t [B], conditions [B, ...] to the prediction [B, ...]."""
        result = self.model(x, t, **dict(zip(self._names, conditions, strict=True)), **self._fixed)
        return pick_tensor(result)


def pick_tensor(result: Any) -> Tensor:
    """The prediction in whatever a model returned: a tensor, ``.sample``, or the first of a tuple."""
    if isinstance(result, Tensor):
        return result
    if hasattr(result, "sample"):
        return pick_tensor(result.sample)
    if isinstance(result, (tuple, list)) and result:
        return pick_tensor(result[0])
    raise CaptureError(
        f"the model returned {type(result).__name__}; expected a tensor, a tuple, or an object with .sample"
    )


def export_module(model: nn.Module, signature: Signature, fixed: dict[str, Any]) -> tuple[ExportedProgram, Signature]:
    """Capture an eager module with torch.export, with a free batch dimension where the model allows it.

    Raises:
        CaptureError: the model cannot be captured; the message quotes torch's reason.
    """
    adapter = CallAdapter(model, [spec.name for spec in signature.conditions], fixed).eval()
    largest = MAX_BATCH
    reason = ""
    for _ in range(3):
        try:
            program = _export_range(adapter, signature, 1, largest)
        except Exception as error:  # torch.export raises many types; all mean "not this way"
            reason = str(error)
            bound = re.search(r"max\s*=\s*(\d+)", reason)
            if bound is None or int(bound.group(1)) >= largest:
                break
            largest = int(bound.group(1))
        else:
            if largest < MAX_BATCH and _same_beyond(program, adapter, signature, largest):
                largest = MAX_BATCH
            return program, replace(signature, max_batch=largest)
    return _export_fixed(adapter, _examples(signature, 2), signature, reason)


def _examples(signature: Signature, batch: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros((batch, *spec.shape), dtype=spec.dtype) for spec in signature.inputs)


def _export_range(adapter: CallAdapter, signature: Signature, smallest: int, largest: int) -> ExportedProgram:
    """Capture for every batch from `smallest` to `largest`."""
    batch = Dim("batch", min=smallest, max=largest)
    # *conditions is one variadic parameter: its dynamic shapes are one tuple, and none at all when it is empty.
    shapes: tuple[Any, ...] = ({0: batch}, {0: batch})
    if signature.conditions:
        shapes += (tuple({0: batch} for _ in signature.conditions),)
    with torch.no_grad():
        example = _examples(signature, max(2, smallest))
        return torch.export.export(adapter, example, dynamic_shapes=shapes, strict=False)


def _same_beyond(program: ExportedProgram, adapter: CallAdapter, signature: Signature, largest: int) -> bool:
    """Whether the model does the same above `largest`, where a branch on the batch size ended the capture.

    diffusers' upsampling calls ``.contiguous()`` from 64 images on: the results are equal, and so are the graphs apart
    from operators that only choose a memory layout.
    """
    try:
        above = _export_range(adapter, signature, largest + 1, MAX_BATCH)
    except Exception:  # then `largest` is what there is
        return False
    return _steps(program) == _steps(above)


def _steps(program: ExportedProgram) -> list[tuple[str, str]]:
    """Operators and arguments of a captured graph in order, nodes by number; operators that only copy are their input."""
    number: dict[fx.Node, int] = {}
    steps: list[tuple[str, str]] = []
    for node in program.graph.nodes:
        source = node.args[0] if node.args else None
        if node.op == "call_function" and op_name(node.target) in _COPIES and isinstance(source, fx.Node):
            number[node] = number[source]
            continue
        number[node] = len(steps)
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: _Numbered(number[n]))
        steps.append((f"{node.op} {node.target}", repr(arguments)))
    return steps


class _Numbered(int):
    """A node in printed arguments, apart from the integer of that value."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def _export_fixed(
    adapter: nn.Module, inputs: tuple[Tensor, ...], signature: Signature, reason: str
) -> tuple[ExportedProgram, Signature]:
    """Fall back to the batch of the example inputs; the signature says so and the engine pads and slices."""
    batch = inputs[0].shape[0]
    try:
        with torch.no_grad():
            program = torch.export.export(adapter, inputs, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture {signature.source or 'the model'}: {_first_lines(str(error))}. "
            f"Export it yourself with torch.export.export and pass the .pt2 file to see the full report"
        ) from error
    told = next(
        (line.strip(" -") for line in reason.splitlines() if "specialized" in line), reason
    )  # the sentence that names the cause
    source = f"{signature.source} [batch fixed at {batch}: {_first_lines(told)}]"
    return program, replace(signature, max_batch=batch, min_batch=batch, source=source)


def _first_lines(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]
