"""An exported graph in ONNX Runtime with everything readable that layers read and write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.export.convert import Exported
from edadm_compile.export.files import save
from edadm_compile.export.optimized import OptimizedGraph, read_optimized
from edadm_compile.export.probes import save_probed
from edadm_compile.ir.program import Program
from edadm_compile.runtime.engines.onnxruntime import make_session


class Probed:
    """A session on a graph and what ONNX Runtime made of it.

    Args:
        folder: for files, which must stay as long as the session is used.

    Attributes:
        optimized: the graph as ONNX Runtime executes it.
    """

    def __init__(self, exported: Exported, folder: Path) -> None:
        plain, probed = folder / "plain.onnx", folder / "probed.onnx"
        save(exported.model, plain)
        make_session(plain, 1, optimized=folder / "optimized.onnx")
        self.optimized: OptimizedGraph = read_optimized(folder / "optimized.onnx")
        save_probed(exported, probed)
        self._session = make_session(probed, torch.get_num_threads())
        self._specs = exported.prepared.signature.inputs

    def run(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """The output and the values at the borders of all layers by name, for x, t and conditions in their types."""
        feeds = {s.name: v.numpy() for s, v in zip(self._specs, inputs, strict=True)}
        if not self._session.get_inputs()[1].shape:  # a scalar timestep: all images must share one then
            feeds[self._specs[1].name] = feeds[self._specs[1].name][:1].reshape(())
        names = [o.name for o in self._session.get_outputs()]
        return dict(zip(names, self._session.run(None, feeds), strict=True))


def other_timestep(program: Program) -> float | None:
    """A timestep that is not in the sampler's tables and that the program computes a row for; None without one."""
    time = program.time
    if time is None or (time.path is None and time.path_outputs):
        return None  # no timesteps, or a table of all
    known = set(time.keys.tolist())
    others = [float(t) for t in range(int(max(known)) + 2) if t not in known]
    return others[len(others) // 2]
