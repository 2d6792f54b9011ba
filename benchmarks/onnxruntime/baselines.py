"""ONNX files of the float model: exported, and quantized by ONNX Runtime's own tool; kept for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.onnxruntime.model import Inputs, Subject, rows_of

#: name -> arguments of `torch.onnx.export`. Later opsets were slower (README.md).
EXPORTERS: dict[str, dict[str, Any]] = {
    "torchscript": {"dynamo": False, "opset_version": 17},
    "dynamo": {"dynamo": True, "external_data": False, "verbose": False},
}
_LAYERS = ["Conv", "Gemm", "MatMul"]
#: name -> (method, operators to quantize; None for all that the tool knows, exporters). With all operators the tool
#: refuses the dynamo graph: normalizations share a constant ("parameter shared mode is not supported for weight yet").
QUANTIZERS: dict[str, tuple[str, list[str] | None, tuple[str, ...]]] = {
    "minmax": ("MinMax", None, ("torchscript",)),
    "entropy": ("Entropy", None, ("torchscript",)),
    "minmax-layers": ("MinMax", _LAYERS, ("torchscript", "dynamo")),
    "entropy-layers": ("Entropy", _LAYERS, ("torchscript", "dynamo")),
}
#: Far from the seeds of measured inputs.
_CALIBRATION_SEED = 1_000_003


@dataclass(frozen=True)
class Calibration:
    """What the quantizer sees.

    Attributes:
        states: timesteps.
        rows: images at each.
        entropy_bins: of the histograms; with ONNX Runtime's default of 128 the search has a single candidate, the
            whole range, and the result is that of min-max.
    """

    states: int = 8
    rows: int = 4
    entropy_bins: int = 1024


@dataclass(frozen=True)
class Baselines:
    """Files at a fixed batch size, made when asked for.

    Attributes:
        subject: the float model.
        folder: where they are kept.
        calibration: for the quantizer.
    """

    subject: Subject
    folder: Path
    calibration: Calibration

    @staticmethod
    def within(workdir: Path, subject: Subject, calibration: Calibration) -> Baselines:
        """A cache folder for this model and this torch."""
        key = hashlib.sha256(f"{subject.digest()} {torch.__version__}".encode()).hexdigest()[:10]
        return Baselines(subject, workdir / f"{subject.name}-{key}", calibration)

    def exported(self, exporter: str, size: int) -> Path:
        """The float model for `size` images."""
        path = self.folder / f"{exporter}-{size}.onnx"
        return _made(path, lambda target: self._export(exporter, size, target))

    def quantized(self, name: str, exporter: str, size: int) -> Path:
        """An entry of `QUANTIZERS` for `size` images."""
        about = (self.calibration, self.subject.trajectory, self.subject.source.sampler, onnxruntime.__version__)
        folder = self.folder / f"int8-{hashlib.sha256(repr(about).encode()).hexdigest()[:10]}"
        source = self.exported(exporter, size)
        prepared = _made(folder / f"{exporter}-{size}.prepared.onnx", lambda target: _prepare(source, target))
        ranges = folder / f"{exporter}-{name}-{_structure(prepared)}.ranges.json"
        path = folder / f"{exporter}-{size}-{name}.onnx"
        return _made(path, lambda target: self._quantize(name, size, prepared, ranges, target))

    def _export(self, exporter: str, size: int, target: Path) -> None:
        example = tuple(self.subject.states(1, size, 0)[0])
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                self.subject.adapter(), example, str(target), input_names=self.subject.names,
                output_names=["prediction"], **EXPORTERS[exporter],
            )  # fmt: skip

    def _quantize(self, name: str, size: int, prepared: Path, ranges: Path, target: Path) -> None:
        """Ranges are found once and shared by the batch sizes whose graphs call the same tensors by the same names."""
        method, operators, _ = QUANTIZERS[name]
        with _quiet():
            if method == "Entropy" and not ranges.exists():
                _made(ranges, lambda found: self._entropy(operators, size, prepared, found))
            quantization.quantize_static(
                prepared, target, self._reader(size), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                op_types_to_quantize=operators, activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8, calibration_cache_path=ranges,
                calibrate_method=quantization.CalibrationMethod[method],
            )  # fmt: skip

    def _entropy(self, operators: list[str] | None, size: int, prepared: Path, found: Path) -> None:
        """Ranges with as many bins as asked for: `quantize_static` does not pass the number on."""
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        calibrator = create_calibrator(
            prepared, operators or sorted({*QDQRegistry, *QLinearOpsRegistry}), str(found.with_suffix(".augmented")),
            quantization.CalibrationMethod.Entropy, extra_options={"num_bins": self.calibration.entropy_bins},
        )  # fmt: skip
        calibrator.collect_data(self._reader(size))
        save_tensors_data(calibrator.compute_data(), found)
        found.with_suffix(".augmented").unlink()

    def _reader(self, size: int) -> quantization.CalibrationDataReader:
        seen = self.subject.states(self.calibration.states, max(size, self.calibration.rows), _CALIBRATION_SEED)
        return _Reader(self.subject.names, [part for state in seen for part in rows_of(state, size)])


class _Reader(quantization.CalibrationDataReader):
    """Calibration inputs, once."""

    def __init__(self, names: list[str], inputs: list[Inputs]) -> None:
        feeds = ({n: v.numpy() for n, v in zip(names, values, strict=True)} for values in inputs)
        self._feeds: Iterator[dict[str, Any]] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def _prepare(source: Path, target: Path) -> None:
    with _quiet():
        quant_pre_process(str(source), str(target))


def _structure(path: Path) -> str:
    """Digest of the nodes and the names between them; the dynamo exporter numbers tensors anew for each batch size."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    text = repr([(node.op_type, list(node.input), list(node.output)) for node in nodes])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """The path, after `make` has written it unless it is there; half a file is never left under its name."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"partial-{path.name}")
        make(partial)
        partial.rename(path)
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and the quantizer print and warn by the hundred; what goes wrong is raised."""
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
