"""Rows of the time tables on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from edadm_compile.errors import ArtifactError
from edadm_compile.ir.program import TimeTables


class TimeRows:
    """The tables of a program side by side on a device: float32 [S, D].

    Args:
        time: the tables, on the host.
        columns: `LaunchPlan.tables`: first column and shape of a row by table name.
        device: where the rows are wanted.

    Raises:
        ArtifactError: `columns` does not describe these tables.
    """

    def __init__(
        self, time: TimeTables, columns: Mapping[str, tuple[int, tuple[int, ...]]], device: torch.device
    ) -> None:
        self._time, self._columns = time, dict(columns)
        self._row_of = {key: i for i, key in enumerate(time.keys.tolist())}
        for name, (_, shape) in columns.items():
            if name not in time.tables or tuple(time.tables[name].shape[1:]) != tuple(shape):
                raise ArtifactError(f"device code: the plan wants time table {name!r} with rows of {list(shape)}")
        self._rows = self._joined(time.tables).to(device)

    def write(self, t: Tensor, out: Tensor) -> None:
        """Enqueue the rows for timesteps `t` [B] of the host into `out` [B, D] of the device.

        A timestep in the tables is looked up on the device, others are computed here and copied.

        Raises:
            InputError: a timestep outside a complete table.
        """
        found = [self._row_of.get(value) for value in t.double().tolist()]
        positions = [row for row in found if row is not None]
        if len(positions) < len(found):
            out.copy_(self._joined(self._time.lookup(t)))
        elif len(set(positions)) == 1:
            out.copy_(self._rows[positions[0]].expand_as(out))
        else:
            index = torch.tensor(positions)
            if out.device.type == "cuda":  # pinned memory is not given to others before the copy has been made
                index = index.pin_memory().to(out.device, non_blocking=True)
            torch.index_select(self._rows, 0, index, out=out)

    def _joined(self, tables: Mapping[str, Tensor]) -> Tensor:
        """float32 [rows, D] of [rows, ...] by name."""
        rows = len(next(iter(tables.values()))) if tables else 0
        width = max((start + _size(shape) for start, shape in self._columns.values()), default=0)
        result = torch.zeros(rows, width)
        for name, (start, shape) in self._columns.items():
            result[:, start : start + _size(shape)] = tables[name].reshape(rows, -1)
        return result


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
