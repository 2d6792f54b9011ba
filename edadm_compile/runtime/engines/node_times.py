"""Time of every node of a graph in ONNX Runtime, from its profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from edadm_compile.ir.timesteps import as_timesteps
from edadm_compile.runtime.engines.onnxruntime import make_session, serialised

if TYPE_CHECKING:
    from edadm_compile.export.convert import Exported

_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTime:
    """Time of one node of the graph that ONNX Runtime executes.

    Attributes:
        operator: ONNX operator.
        microseconds: median over the calls.
    """

    operator: str
    microseconds: float


def node_times(
    exported: Exported, inputs: Sequence[Sequence[Tensor]], *, calls: int = 20, seconds: float = 5.0, warm: int = 2
) -> dict[str, NodeTime]:
    """Run a graph on one thread with the profiler on.

    Args:
        inputs: x, t, conditions of the calls, taken in turn.
        calls: at most.
        seconds: no further call begins after this time, but three are made.
        warm: calls before, not counted.

    Returns:
        by node name, in execution order.

    Raises:
        TargetError: ONNX Runtime is not installed, or refuses the graph.
    """
    with tempfile.TemporaryDirectory(prefix="edadm-") as folder:
        session = make_session(serialised(exported.model), 1, profile=Path(folder) / "times")
        specs = exported.prepared.signature.inputs
        ranks = {i.name: len(i.shape) for i in session.get_inputs()}
        begin, done = 0.0, 0
        while done < warm + 3 or (done < warm + calls and time.monotonic() - begin < seconds):
            if done == warm:
                begin = time.monotonic()
            given = inputs[done % len(inputs)]
            values = (given[0], as_timesteps(given[1], specs[1].dtype), *given[2:])
            arrays = {s.name: v.to(s.dtype).numpy() for s, v in zip(specs, values, strict=True) if s.name in ranks}
            session.run(None, {n: a if ranks[n] else a[:1].reshape(()) for n, a in arrays.items()})
            done += 1
        events = json.loads(Path(session.end_profiling()).read_text())
    return _medians(events, warm)


def _medians(events: Sequence[dict[str, object]], warm: int) -> dict[str, NodeTime]:
    found: dict[str, list[float]] = {}
    operators: dict[str, str] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith(_SUFFIX):
            node = name.removesuffix(_SUFFIX)
            found.setdefault(node, []).append(float(event["dur"]))  # type: ignore[arg-type]
            operators[node] = str(event["args"]["op_name"])  # type: ignore[index]
    return {node: NodeTime(operators[node], statistics.median(times[warm:] or times)) for node, times in found.items()}
