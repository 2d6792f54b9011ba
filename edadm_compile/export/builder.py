"""An ONNX graph under construction: nodes in order, constants stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor

#: torch type -> ONNX type of constants, casts and inputs. bfloat16 becomes float32, which holds all of its values:
#: ONNX Runtime has hardly an operator for it on a CPU.
DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.DOUBLE, torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.FLOAT, torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8,
    torch.int16: ir.DataType.INT16, torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}  # fmt: skip


class Builder:
    """Appends nodes; every value has a name, and equal constants are one initializer.

    Args:
        outer: builder of the graph around a subgraph; constants go there.
    """

    def __init__(self, outer: Builder | None = None) -> None:
        self._tape = tape.Tape()
        self._root: Builder = self if outer is None else outer._root
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._names: set[str] = set()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """Nodes so far, in order."""
        return self._tape.nodes

    @property
    def initializers(self) -> Sequence[ir.Value]:
        """Constants so far."""
        return self._tape.initializers

    def op(
        self, op_type: str, *inputs: ir.Value | None, name: str = "", domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node with one output.

        Args:
            name: wished for node and output; made unique.
            attributes: ints, floats, strings, lists of them, `ir.DataType` (stored as int) or `ir.Graph`.
        """
        return self.ops(op_type, *inputs, outputs=1, name=name, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, name: str = "", domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Append a node with several outputs."""
        plain = {k: int(v) if isinstance(v, ir.DataType) else v for k, v in attributes.items() if v is not None}
        label = self.unique(name or op_type)
        values = self._tape.op_multi_out(op_type, list(inputs), plain, num_outputs=outputs, name=label, domain=domain)
        for index, value in enumerate(values):
            value.name = label if outputs == 1 else f"{label}.{index}"
        return tuple(values)

    def constant(self, value: Any, dtype: torch.dtype | None = None, name: str = "") -> ir.Value:
        """A constant: a tensor, a number or a (nested) list of numbers; equal ones are stored once.

        Args:
            dtype: type to store; by default the tensor's, float32 for floats and int64 for ints.
        """
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=dtype or (torch.float32 if _has_float(value) else torch.int64))
        tensor = value.detach().to(dtype or value.dtype).contiguous()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        data = tensor.numpy()
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(data.tobytes()).digest())
        return self._stored(key, name, lambda label: ir.tensor(data, dtype=DTYPES[tensor.dtype], name=label))

    def packed_int4(self, codes: Tensor, name: str) -> ir.Value:
        """A constant of type INT4 from int8 codes in [-8, 7]: two per byte in the file."""
        import ml_dtypes

        data = codes.contiguous().numpy()
        key = ("int4", data.shape, hashlib.sha256(data.tobytes()).digest())
        return self._stored(key, name, lambda label: ir.tensor(data.astype(ml_dtypes.int4), name=label))

    def _stored(self, key: tuple[Any, ...], name: str, make: Any) -> ir.Value:
        root = self._root
        if key not in root._constants:
            root._constants[key] = root._tape.initializer(make(root.unique(name or "constant")))
        return root._constants[key]

    def unique(self, name: str) -> str:
        """`name`, with a number behind it where it is taken."""
        names = self._root._names
        chosen, serial = name, 1
        while chosen in names:
            serial += 1
            chosen = f"{name}_{serial}"
        names.add(chosen)
        return chosen


def _has_float(value: Any) -> bool:
    return any(_has_float(v) for v in value) if isinstance(value, (list, tuple)) else isinstance(value, float)
