"""Ways to call a model on the processor: one call on several threads, or several callers with one thread each."""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from benchmarks.onnxruntime.model import Inputs, Subject

#: How a batch is divided: one call on all threads, or one session of one thread called from as many threads at once.
MODES = ("threads", "callers")
#: Forms of torch: name -> (channels last, options of `torch.compile`; None for eager).
TORCH: dict[str, dict[str, tuple[bool, dict[str, Any] | None]]] = {
    "torch eager fp32": {"default": (False, None), "channels_last": (True, None)},
    "torch inductor fp32": {
        "default": (False, {}),
        "channels_last": (True, {}),
        "freezing": (False, {"freezing": True}),
    },
}


@dataclass(frozen=True)
class Running:
    """A model that is ready.

    Attributes:
        prepare: inputs as it wants them; not timed.
        call: prepared inputs to the prediction; timed.
    """

    prepare: Callable[[Inputs], Any]
    call: Callable[[Any], Any]

    def predict(self, inputs: Inputs) -> Tensor:
        """The prediction as float32 [B, ...]."""
        return torch.as_tensor(self.call(self.prepare(inputs))).detach().float().clone()


@dataclass(frozen=True)
class Graph:
    """An ONNX file with the settings of its session.

    Attributes:
        path: the file.
        nhwc: leave the NhwcTransformer on, as ONNX Runtime does by default.
        fixed: size to give a symbolic batch dimension when the session is made; None leaves it free.
    """

    path: Path
    nhwc: bool = True
    fixed: int | None = None

    def session(self, threads: int, optimized: Path | None = None) -> onnxruntime.InferenceSession:
        """A session on the processor.

        Args:
            threads: intra-op; the inter-op pool is not used in sequential execution.
            optimized: where to write the graph that executes.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions leave the cores alone
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if self.fixed is not None and (name := batch_dimension(self.path)) is not None:
            options.add_free_dimension_override_by_name(name, self.fixed)
        off = [] if self.nhwc else ["NhwcTransformer"]
        return onnxruntime.InferenceSession(
            str(self.path), options, providers=["CPUExecutionProvider"], disabled_optimizers=off
        )  # fmt: skip

    def operators(self) -> dict[str, int]:
        """How often each operator stands in the graph that executes."""
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "optimized.onnx"
            self.session(1, target)
            nodes = onnx.load(target, load_external_data=False).graph.node
        return dict(Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in nodes).most_common())


def batch_dimension(path: Path) -> str | None:
    """The name of a symbolic batch dimension; None when the file has a fixed one."""
    first = onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0]
    return first.dim_param or None


def start(graph: Graph, names: list[str], mode: str, cores: int, pool: ThreadPoolExecutor) -> Running:
    """A session in one of the `MODES`.

    Args:
        names: of the model's inputs, in order; a file may lack those it does not need.
        cores: threads of the call, or callers.
        pool: as many threads as cores; the callers.
    """
    session = graph.session(cores if mode == "threads" else 1)
    output = [session.get_outputs()[0].name]
    wanted = {i.name for i in session.get_inputs()}
    if unknown := wanted - set(names):
        raise ValueError(f"{graph.path} wants inputs {sorted(unknown)}, the model has {names}")

    def prepare(inputs: Inputs) -> dict[str, np.ndarray]:
        return {n: v.contiguous().numpy() for n, v in zip(names, inputs, strict=True) if n in wanted}

    def whole(feeds: dict[str, np.ndarray]) -> np.ndarray:
        return session.run(output, feeds)[0]

    def divided(feeds: dict[str, np.ndarray]) -> np.ndarray:
        rows = len(feeds[names[0]]) // cores
        parts = ({n: v[i * rows : (i + 1) * rows] for n, v in feeds.items()} for i in range(cores))
        return np.concatenate(list(pool.map(whole, parts)))

    return Running(prepare, whole if mode == "threads" else divided)


def start_torch(subject: Subject, last: bool, options: dict[str, Any] | None) -> Running:
    """The float model in torch; threads are torch's setting.

    Args:
        last: channels-last memory format.
        options: of `torch.compile` in its default mode; None for eager.
    """
    module = copy.deepcopy(subject.adapter())
    layout = torch.channels_last if last else torch.contiguous_format
    if last:
        module = module.to(memory_format=layout)
    run = module if options is None else torch.compile(module, dynamic=False, options=options or None)

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return run(*inputs)

    return Running(lambda inputs: [inputs[0].contiguous(memory_format=layout), *inputs[1:]], call)
