"""What the engines find on this machine: integer products of ONNX Runtime, GPUs of the CUDA driver."""

from __future__ import annotations

from typing import Any

import numpy as np

from edadm_compile.runtime.engines.cuda_driver import CudaDriver
from edadm_compile.runtime.engines.onnxruntime import make_session


def largest_products(model: bytes, channels: int) -> int:
    """Run a convolution of uint8 codes 255 with int8 codes 127; every result must be equal.

    Args:
        model: of `edadm_compile.export.trial.integer_convolution`.
        channels: inputs to each sum.

    Raises:
        TargetError: ONNX Runtime is not installed, or refuses the model.
    """
    x = np.full((1, channels, 8, 8), 255, np.uint8)
    w = np.full((16, channels, 1, 1), 127, np.int8)
    (y,) = make_session(model, 1).run(None, {"x": x, "w": w})
    return int(y.reshape(-1)[np.argmax(np.abs(y.reshape(-1) - channels * 255 * 127))])


def find_gpus() -> tuple[str, list[dict[str, Any]]]:
    """Version of CUDA that the driver offers, and name, architecture and memory (bytes) of each GPU.

    Raises:
        TargetError: cuda-bindings or the driver is not installed, or the driver finds no GPU.
    """
    driver = CudaDriver()
    version = driver.version()
    return f"{version // 1000}.{version % 1000 // 10}", driver.gpus()
