"""Compile every kernel of a UNet for every architecture and read the machine code: no GPU needed.

    python benchmarks/kernels/census.py cifar10 --targets all --batch 1,8 -o benchmarks/results/cpu-2core/census_cifar10.json

The models have random weights: shapes decide what is compiled. For each architecture the file has the number of
distinct kernels, largest registers and shared memory, spills, integer tensor-core instructions and violations
(`edadm_compile.kernels.census.check`), and the seconds of the compilation with the number of processes used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver.device_code import DeviceOptions, make_plans
from edadm_compile.frontend import source_from_module
from edadm_compile.ir.program import Program, SamplerSpec
from edadm_compile.kernels import aot, census
from edadm_compile.kernels.request import triton_version
from edadm_compile.kernels.targets import parse_targets
from edadm_compile.pipeline import compile_source
from edadm_compile.runtime.artifact import read

SAMPLER = SamplerSpec({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}, 1)
MATRIX = ("qconv2d", "qlinear")


def cifar10() -> tuple[torch.nn.Module, tuple[int, int, int], dict[str, torch.Tensor]]:
    """google/ddpm-cifar10-32's configuration, 35.7 M parameters."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(128, 256, 256, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None,
    )  # fmt: skip
    return model, (3, 32, 32), {}


def sd15() -> tuple[torch.nn.Module, tuple[int, int, int], dict[str, torch.Tensor]]:
    """Stable Diffusion 1.5's configuration, 859.5 M parameters."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768, attention_head_dim=8,
    )  # fmt: skip
    return model, (4, 64, 64), {"encoder_hidden_states": torch.randn(4, 77, 768)}


MODELS = {"cifar10": cifar10, "sd15": sd15}


def lowered(name: str, preset: tuple[int, int]) -> Program:
    """The model rounded to nearest on two samples."""
    torch.manual_seed(0)
    model, shape, conditions = MODELS[name]()
    config = QuantConfig(
        weight_bits=preset[0], act_bits=preset[1], method="minmax", calib_samples=2, tdac=TdacConfig(trajectories=1),
        reconstruction=ReconstructionConfig(iters=0),
    )  # fmt: skip
    source = source_from_module(model.eval(), SAMPLER, shape=shape, conditions=conditions)
    return compile_source(source, config, quality=False).lowered


def measure(program: Program, targets: tuple[str, ...], batches: tuple[int, ...], jobs: int) -> dict[str, Any]:
    """Compile for each architecture from an empty cache and read the code."""
    found: dict[str, Any] = {}
    for arch in targets:
        start = time.perf_counter()
        plans = make_plans(program, DeviceOptions((arch,), batches))
        wanted = aot.distinct(plans)
        with tempfile.TemporaryDirectory() as folder:
            compiled = time.perf_counter()
            cubins = aot.compile_plans(plans, jobs=jobs, cache=Path(folder))
        seconds = time.perf_counter() - compiled
        found[arch] = _read(wanted, cubins) | {
            "launches": {f"batch {p.batch}": len(p.launches) - p.conditioning for p in plans},
            "library_launches": sum(x.kernel == "torch" for p in plans for x in p.launches),
            "plan_seconds": round(compiled - start, 1), "compile_seconds": round(seconds, 1),
        }  # fmt: skip
        print(arch, json.dumps({k: v for k, v in found[arch].items() if k != "kinds"}), flush=True)
    return found


def _read(wanted: dict[str, Any], cubins: dict[str, Any]) -> dict[str, Any]:
    violations, kinds, tensor_cores, spills = [], Counter(), 0, 0
    for key, job in wanted.items():
        kernel, cubin = job.request.kernel, cubins[key]
        kinds[kernel] += 1
        read = census.census(cubin.data, cubin.shared)
        integer = kernel in MATRIX
        tensor_cores += integer and bool(read.integer_mma)
        spills += cubin.spills
        violations += [f"{job}: {text}" for text in census.check(read, job.request.arch, integer)]
    return {
        "kernels": len(wanted), "kinds": dict(kinds), "matrix_kernels": sum(kinds[k] for k in MATRIX),
        "with_integer_tensor_cores": tensor_cores, "spill_bytes": spills, "violations": violations,
        "most_registers": max(c.registers for c in cubins.values()), "most_shared": max(c.shared for c in cubins.values()),
        "code_bytes": sum(len(c.data) for c in cubins.values()),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help=f"{', '.join(sorted(MODELS))}, or a .qmod file")
    parser.add_argument("--targets", default="all")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--weight-bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    start = time.perf_counter()
    from_file = given.model.endswith(".qmod")
    program = read(Path(given.model)).lowered if from_file else lowered(given.model, (given.weight_bits, 8))
    print(f"quantized in {time.perf_counter() - start:.0f} s", flush=True)
    batches = tuple(int(b) for b in given.batch.split(","))
    result = {
        "model": Path(given.model).stem, "weights": f"w{given.weight_bits}a8", "batches": list(batches), "jobs": given.jobs,
        "cores": os.cpu_count(), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        "triton": triton_version(), "targets": measure(program, parse_targets(given.targets), batches, given.jobs),
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
