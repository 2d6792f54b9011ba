"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

import edadm_compile

#: Distributions in the order they are shown.
PACKAGES = ("torch", "numpy", "diffusers", "safetensors", "triton", "onnx", "onnxruntime", "cuda-bindings")


def version_of(name: str) -> str | None:
    """Version of an installed distribution; None where it is missing. Nothing is imported."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed, by distribution."""
    return {name: version for name in PACKAGES if (version := version_of(name)) is not None}


def version_line() -> str:
    """One line: this package, Python, and the libraries that are installed."""
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"edadm-compile {edadm_compile.__version__}, Python {platform.python_version()}, {libraries}"
