"""Compile and export the model of the comparison.

    python -m benchmarks.onnxruntime.ours build/ours.onnx

W8A8 for ONNX Runtime with int8 attention. Random weights have nothing to reconstruct, so ranges are searched and the rest
is left out: two minutes, most of them for finding the convolutions whose output must stay float.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from benchmarks.onnxruntime.model import load
from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver.compile import compile_model
from edadm_compile.driver.export import export_onnx
from edadm_compile.report.export_tables import print_export

CONFIG = QuantConfig(
    8, 8, deploy="onnxruntime", attention="int8", calib_samples=16, tdac=TdacConfig(trajectories=2),
    reconstruction=ReconstructionConfig(iters=0),
)  # fmt: skip


def main() -> None:
    """Write the ONNX file, and the ``.qmod`` file beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's)")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    compiled = args.output.with_suffix(".qmod")
    source = load(None, args.steps, None).source
    # Random weights predict no noise: without clipping their trajectories leave the range of images.
    schedule = {**source.sampler.scheduler, "clip_sample": True}
    source = dataclasses.replace(source, sampler=dataclasses.replace(source.sampler, scheduler=schedule))
    result = compile_model(source, CONFIG, output=compiled)
    print(result, "float outputs:", ", ".join(result.stats["float_outputs"]["float_outputs"]) or "none")
    print_export(export_onnx(compiled, args.output))


if __name__ == "__main__":
    main()
