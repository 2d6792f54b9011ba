"""Ahead-of-time compiler from trained diffusion UNets to integer programs, quantized with EDA-DM (arXiv 2401.04585).

The public names below are resolved on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edadm_compile.config import LayerRule, QuantConfig, ReconstructionConfig, TdacConfig
    from edadm_compile.driver.compile import compile_model
    from edadm_compile.driver.evaluate import evaluate_model
    from edadm_compile.driver.export import export_onnx
    from edadm_compile.runtime.session import CompiledModel, load

__version__ = "0.1.0"

_HOME = {
    "QuantConfig": "config", "LayerRule": "config", "TdacConfig": "config", "ReconstructionConfig": "config",
    "compile_model": "driver.compile", "export_onnx": "driver.export",
    "evaluate_model": "driver.evaluate",
    "load": "runtime.session", "CompiledModel": "runtime.session",
}  # fmt: skip

__all__ = [
    "CompiledModel", "LayerRule", "QuantConfig", "ReconstructionConfig", "TdacConfig", "compile_model",
    "evaluate_model", "export_onnx", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
