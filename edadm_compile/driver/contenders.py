"""What `bench` compares: the compiled file, and the float model in the forms people run it in."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.errors import InputError
from edadm_compile.frontend import Source
from edadm_compile.ir.program import Program, get_constant
from edadm_compile.passes.capture import pick_tensor
from edadm_compile.runtime.engines import ENGINES
from edadm_compile.runtime.engines.onnxruntime import missing_packages
from edadm_compile.runtime.session import CompiledModel, load

#: ONNX Runtime's convolutions write 8-bit codes: what that may cost beyond the reference engine, dB.
OUTPUT_CODES_DB = 3.0

#: (x, t, *conditions) -> prediction
Predict = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute the prediction.

    Attributes:
        name: short.
        what: a sentence for people.
        build: puts it on its device.
        weight_bytes: parameters in the form it keeps them.
        dtype: of x and float conditions as it wants them.
        ours: runs the compiled file.
        host_time: takes the timesteps on the host (where no copy to it is needed), else beside x.
        slack: dB that it may be farther from the float model than the reference engine, for what it rounds on purpose.
    """

    name: str
    what: str
    build: Callable[[], Predict]
    weight_bytes: int
    dtype: torch.dtype = torch.float32
    ours: bool = False
    host_time: bool = False
    slack: float = 0.0

    def place(self, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
        """Inputs (float32, on the host) as this contender wants them."""
        placed = [
            value.to(device=device, dtype=self.dtype if value.dtype.is_floating_point else None) for value in inputs
        ]
        placed[1] = inputs[1] if self.host_time else inputs[1].to(device)
        return placed


def our_contenders(path: Path, device: str, program: Program) -> list[Contender]:
    """The compiled file on every engine of a device kind that works here.

    Args:
        path: the file; each contender loads it itself, which is part of its cold start.
        device: "cpu" or "cuda".
        program: the lowered program in it, for its size.
    """
    size = program_bytes(program)

    def build(engine: str) -> Callable[[], Predict]:
        def make() -> Predict:
            model: CompiledModel = load(path, device, engine, shape=program.signature.inputs[0].shape)
            return model.predict

        return make

    return [
        Contender(
            name, f"the compiled file on the {name} engine", build(name), size, ours=True, host_time=device == "cuda",
            slack=OUTPUT_CODES_DB if name == "onnxruntime" else 0.0,
        )
        for name in available_engines(device)
    ]  # fmt: skip


def available_engines(device: str) -> list[str]:
    """Engines of a device kind whose packages are installed."""
    return [name for name in ENGINES[device] if name != "onnxruntime" or not missing_packages()]


def program_bytes(program: Program) -> int:
    """Bytes of all tensors of a program; shared ones count once."""
    targets = {str(node.target) for node in program.graph_module.graph.nodes if node.op == "get_attr"}
    tensors = [get_constant(program.graph_module, name) for name in targets]
    return sum(value.numel() * value.element_size() for value in tensors)


#: The forms of the float model: name -> (sentence, dtype, channels last, how it is called), by device kind.
BASELINES: dict[str, dict[str, tuple[str, torch.dtype, bool, str]]] = {
    "cpu": {
        "eager fp32": ("the float model in torch", torch.float32, False, ""),
        "channels_last fp32": ("the same in channels-last memory format", torch.float32, True, ""),
    },
    "cuda": {
        "eager fp16": ("the float model in torch, half precision", torch.float16, False, ""),
        "channels_last fp16": ("the same in channels-last memory format", torch.float16, True, ""),
        "CUDA graph fp16": ("that one replayed as a CUDA graph", torch.float16, True, "graph"),
        "torch.compile reduce-overhead fp16": (
            "the same through torch.compile(mode='reduce-overhead'), CUDA graphs on", torch.float16, True, "reduce-overhead",
        ),
        "torch.compile fp16": (
            "the same through torch.compile(mode='max-autotune'), CUDA graphs on", torch.float16, True, "max-autotune",
        ),
    },
}  # fmt: skip


def baseline_contenders(source: Source, device: str, names: Sequence[str] | None = None) -> list[Contender]:
    """The float model in the forms of `BASELINES`.

    Args:
        source: the float model.
        device: "cpu" or "cuda".
        names: which of them; None for all.

    Raises:
        InputError: the source is a captured graph without a module and the device is not the CPU.
    """
    if source.module is None:
        if device != "cpu":
            raise InputError(
                "--baseline: a torch.export archive cannot be moved to another type; give the checkpoint, "
                "the diffusers folder, or a state dict with --factory"
            )
        what = "the captured graph of the float model"
        return [Contender("eager fp32", what, source.denoiser, 2 * source.parameter_bytes())]
    return [
        Contender(name, what, _baseline(source, device, dtype, last, how), source.parameters() * dtype.itemsize, dtype)
        for name, (what, dtype, last, how) in BASELINES[device].items()
        if names is None or name in names
    ]


def best_algorithms() -> AbstractContextManager[Any]:
    """While it is open cuDNN times its algorithms at the first call of each shape: the float model at its best."""
    context: AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=True, benchmark=True)
    return context


def _baseline(source: Source, device: str, dtype: torch.dtype, last: bool, how: str) -> Callable[[], Predict]:
    def make() -> Predict:
        assert source.module is not None
        module = nn.Module.to(copy.deepcopy(source.module), device=device, dtype=dtype)  # diffusers' own `to` warns
        fixed = {name: _moved(value, device, dtype) for name, value in source.fixed.items()}
        if last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if how == "graph":
            return _Replayed(_predictor(module, source, fixed, last, ""))
        return _predictor(module, source, fixed, last, how)

    return make


def _predictor(module: nn.Module, source: Source, fixed: dict[str, Any], last: bool, mode: str) -> Predict:
    names = [spec.name for spec in source.signature.conditions]
    run: Any = torch.compile(module, mode=mode, dynamic=False) if mode else module

    def call(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        if mode:
            torch.compiler.cudagraph_mark_step_begin()
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            return pick_tensor(run(x, t, **dict(zip(names, conditions, strict=True)), **fixed))

    return call


class _Replayed:
    """A prediction recorded as a CUDA graph at the first call of each shape of inputs, then replayed.

    Args:
        predict: works on the GPU alone.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._recorded: dict[tuple[torch.Size, ...], tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """A new tensor."""
        key = tuple(value.shape for value in inputs)
        if key not in self._recorded:
            self._recorded[key] = self._record([value.clone() for value in inputs])
        places, graph, output = self._recorded[key]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return output.clone()

    def _record(self, places: list[Tensor]) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their algorithms outside the graph
                self._predict(*places)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._predict(*places)
        return places, graph, output


def _moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.dtype.is_floating_point else None)
    return {k: _moved(v, device, dtype) for k, v in value.items()} if isinstance(value, dict) else value


def timed(function: Callable[[], Any], wait: Callable[[], None], now: Callable[[], float] = time.perf_counter) -> Any:
    """A result and the seconds until it is there."""
    start = now()
    result = function()
    wait()
    return result, now() - start
