"""The ONNX Runtime engine: integer kernels on the CPU, in the run mode that is fastest for a batch."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from edadm_compile.errors import InputError, TargetError
from edadm_compile.ir.program import Program
from edadm_compile.ir.timesteps import as_timesteps

if TYPE_CHECKING:  # packages of the [onnx] extra
    import onnx_ir as ir

    from edadm_compile.export.convert import Exported

#: NCHW and QDQ graphs are 2 to 4 % faster without it when one-thread callers share a batch (docs/onnx.md).
DISABLED_OPTIMIZERS = ["NhwcTransformer"]


def missing_packages(*, runtime: bool = True) -> str:
    """Names of the packages that are not installed and needed here; "" when all are.

    Args:
        runtime: to run graphs, not only to write them.
    """
    from importlib.util import find_spec

    names = ("onnx", "onnx_ir", *(("onnxruntime",) if runtime else ()))
    return ", ".join(name for name in names if find_spec(name) is None)


def make_session(model: bytes | Path, threads: int, optimized: Path | None = None, profile: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Args:
        model: serialised model, or its file.
        threads: inside one operator.
        optimized: where to write the graph that runs.
        profile: prefix of the file with times by node.

    Raises:
        TargetError: ONNX Runtime is not installed, or refuses the model.
    """
    missing = missing_packages()
    if missing:
        raise TargetError(f"ONNX Runtime engine: {missing} not installed; run: pip install 'edadm-compile[onnx]'")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle threads leave the cores to others
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=DISABLED_OPTIMIZERS
        )
    except Exception as error:  # its own exceptions share no base class
        raise TargetError(f"ONNX Runtime {ort.__version__} refuses the model: {str(error)[:400]}") from error


class OnnxRuntimeEngine:
    """Runs a qdq program as a QDQ graph in ONNX Runtime.

    Two run modes. With at least two images and cores the batch is split over callers with one thread each, which share
    one session: short operators then need no barrier. A single image runs in one call with a thread per core.

    Args:
        program: a qdq program, or one that has been exported already (for any target).
        threads: cores to use; by default `torch.get_num_threads()`.

    Raises:
        ExportError: the program has no ONNX form.
        TargetError: ONNX Runtime is not installed, or refuses the graph.
    """

    name, device = "onnxruntime", "cpu"

    def __init__(self, program: Program | Exported, threads: int | None = None) -> None:
        missing = missing_packages()
        if missing:
            raise TargetError(f"ONNX Runtime engine: {missing} not installed; run: pip install 'edadm-compile[onnx]'")
        exported = _export(program) if isinstance(program, Program) else program
        self.signature = exported.prepared.signature
        self.threads = threads or torch.get_num_threads()
        self._data = serialised(exported.model)
        if isinstance(self._data, Path):
            weakref.finalize(self, shutil.rmtree, self._data.parent, ignore_errors=True)
        self._last = _last_timestep(exported.prepared)
        self._sessions: dict[int, Any] = {}
        self._pool = ThreadPoolExecutor(self.threads, "edadm-onnxruntime") if self.threads > 1 else None
        self.session(1 if self.mode(self.threads) == "callers" else self.threads)  # refused here, not in the first call

    def mode(self, batch: int) -> str:
        """How a batch runs: "callers" (split over one-thread callers) or "threads" (one call)."""
        fixed = self.signature.min_batch == self.signature.max_batch
        return "callers" if self.threads > 1 and batch > 1 and not fixed else "threads"

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Predict the noise for x [B, C, H, W], t [B], conditions; float32."""
        specs = self.signature.inputs
        t = as_timesteps(inputs[1].detach(), specs[1].dtype)
        values = (inputs[0], t, *inputs[2:])
        tensors = [v.detach().to("cpu", s.dtype).contiguous() for v, s in zip(values, specs, strict=True)]
        batch = tensors[0].shape[0]
        self._check_timesteps(tensors[1])
        if self.signature.min_batch == self.signature.max_batch:
            pieces = self.signature.batches(tensors)
            return torch.cat([self._call(self.session(self.threads), piece)[:rows] for piece, rows in pieces])
        if self.mode(batch) == "threads":
            return self._call(self.session(self.threads), tensors)
        return self._split(tensors, batch)

    def _check_timesteps(self, t: Tensor) -> None:
        if self._last is not None and not bool(((t >= 0) & (t <= self._last) & (t == t.round())).all()):
            raise InputError(f"timestep: got {t.tolist()}, allowed are the integers 0 to {self._last} of the schedule")

    def session(self, threads: int) -> Any:
        """The session with that many threads, made on first use."""
        if threads not in self._sessions:
            self._sessions[threads] = make_session(self._data, threads)
        return self._sessions[threads]

    def _split(self, tensors: Sequence[Tensor], batch: int) -> Tensor:
        assert self._pool is not None
        session = self.session(1)
        callers = min(self.threads, batch)
        result = self._output(tensors[0])
        parts = zip(*(v.tensor_split(callers) for v in (*tensors, result)), strict=True)
        jobs = [self._pool.submit(_bound_run, session, self.signature.inputs, part[:-1], part[-1]) for part in parts]
        for job in jobs:
            job.result()
        return result

    def _call(self, session: Any, tensors: Sequence[Tensor]) -> Tensor:
        result = self._output(tensors[0])
        _bound_run(session, self.signature.inputs, tensors, result)
        return result

    def _output(self, x: Tensor) -> Tensor:
        shape = self.session(1 if self.mode(x.shape[0]) == "callers" else self.threads).get_outputs()[0].shape
        return torch.empty((x.shape[0], *shape[1:]))


def _bound_run(session: Any, specs: Sequence[Any], tensors: Sequence[Tensor], result: Tensor) -> None:
    """One run that reads and writes the tensors' own memory."""
    binding = session.io_binding()
    ranks = {i.name: len(i.shape) for i in session.get_inputs()}
    for spec, value in zip(specs, tensors, strict=True):
        if spec.name in ranks:  # a graph with a scalar timestep is for batches that share it
            _bind(binding.bind_input, spec.name, value if ranks[spec.name] else value[0])
    _bind(binding.bind_output, session.get_outputs()[0].name, result)
    session.run_with_iobinding(binding)


def _bind(bind: Any, name: str, value: Tensor) -> None:
    kind = np.dtype(str(value.dtype).removeprefix("torch.")).type
    bind(name, "cpu", 0, kind, list(value.shape), value.data_ptr())


def _export(program: Program) -> Exported:
    from edadm_compile.export.convert import convert
    from edadm_compile.export.targets import target

    return convert(program, target("cpu"))


def serialised(model: ir.Model) -> bytes | Path:
    """The model as bytes, or as a file where it is too large for one message."""
    import onnx_ir as ir

    from edadm_compile.export.files import needs_external_data, save

    if not needs_external_data(model):
        data: bytes = ir.to_proto(model).SerializeToString()
        return data
    path = Path(tempfile.mkdtemp(prefix="edadm-")) / "unet.onnx"
    try:
        save(model, path)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise
    return path


def _last_timestep(program: Program) -> int | None:
    """The largest timestep of a program that knows no others than those of its table; None for one that does."""
    time = program.time
    return int(time.keys[-1]) if time is not None and time.path is None and time.path_outputs else None
