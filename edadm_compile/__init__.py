"""Ahead-of-time compiler from trained diffusion UNets to integer programs, quantized with EDA-DM (arXiv 2401.04585).

The public names below are resolved on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edadm_compile.calibration.given import CalibrationSamples
    from edadm_compile.callbacks import Advanced, BlockFinished, Callbacks, Event, StageStarted
    from edadm_compile.config import LayerRule, QuantConfig, ReconstructionConfig, TdacConfig
    from edadm_compile.driver.compile import compile_model
    from edadm_compile.driver.evaluate import evaluate_model
    from edadm_compile.driver.export import export_onnx
    from edadm_compile.ir.program import SamplerSpec
    from edadm_compile.runtime.session import CompiledModel, load

__version__ = "0.1.0"

_HOME = {
    "QuantConfig": "config", "LayerRule": "config", "TdacConfig": "config", "ReconstructionConfig": "config",
    "compile_model": "driver.compile", "export_onnx": "driver.export",
    "evaluate_model": "driver.evaluate",
    "load": "runtime.session", "CompiledModel": "runtime.session",
    "CalibrationSamples": "calibration.given", "SamplerSpec": "ir.program",
    "Callbacks": "callbacks", "Event": "callbacks", "StageStarted": "callbacks", "Advanced": "callbacks",
    "BlockFinished": "callbacks",
}  # fmt: skip

__all__ = [
    "Advanced", "BlockFinished", "CalibrationSamples", "Callbacks", "CompiledModel", "Event", "LayerRule", "QuantConfig",
    "ReconstructionConfig", "SamplerSpec", "StageStarted", "TdacConfig", "compile_model", "evaluate_model", "export_onnx",
    "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
