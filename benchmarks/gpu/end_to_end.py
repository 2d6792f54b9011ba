"""Whole UNets of published configurations with random weights: compiled on the spot, checked, timed beside torch.

    python -m benchmarks.gpu.end_to_end --model sd15 --batch 1,8 --out FILE.json

Quality means nothing here (random weights, a handful of calibration samples, rounded to nearest); times do not depend on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from benchmarks.gpu.compiled_baselines import ready
from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver import bench
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.contenders import BASELINES
from edadm_compile.driver.device_code import DeviceOptions, build
from edadm_compile.driver.kernel_times import all_launches
from edadm_compile.driver.machine import Device, pick_device
from edadm_compile.frontend import Source, source_from_module
from edadm_compile.ir.program import SamplerSpec
from edadm_compile.kernels.targets import arch_of
from edadm_compile.pipeline import compile_source
from edadm_compile.report.progress import LineProgress
from edadm_compile.runtime.artifact import read, write

_SAMPLER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "clip_sample": False,
}
#: Sampling steps and calibration samples: quality means nothing here, and a large UNet takes its time on a CPU.
_CALIBRATION = {"sd15": (1, 1)}
#: Rows of weights that differ from each other.
_ROWS = 16
_BLOCK, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
CONFIGS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None,
        "down_block_types": (_BLOCK, "AttnDownBlock2D", _BLOCK, _BLOCK),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "tiny": {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "norm_num_groups": 8,
        "block_out_channels": (16, 32), "attention_head_dim": 8,
        "down_block_types": (_BLOCK, "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip


def source(name: str) -> Source:
    """A model of a published configuration with random weights; the same ones every time."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    sampler = SamplerSpec(_SAMPLER, _CALIBRATION.get(name, (4, 4))[0])
    if "cross_attention_dim" not in config:
        return source_from_module(_repeated(diffusers.UNet2DModel(**config)), sampler)
    context = torch.randn(4, 77, config["cross_attention_dim"])
    module = _repeated(diffusers.UNet2DConditionModel(**config))
    return source_from_module(module, sampler, conditions={"encoder_hidden_states": context})


def _repeated(module: nn.Module) -> nn.Module:
    """Every parameter made of its first `_ROWS` rows again and again: a compiled file that packs to a few megabytes.

    What is timed stays what it was: random operands along the sum, the same loads and the same arithmetic.
    """
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(value[torch.arange(len(value)) % _ROWS])
    return module


def compile_model(
    name: str, made: Source, output: Path, batches: tuple[int, ...], targets: tuple[str, ...], bits: int
) -> float:
    """Compile quickly; returns the seconds it took."""
    start = time.perf_counter()
    config = QuantConfig(
        bits, 8, method="minmax", calib_samples=_CALIBRATION.get(name, (4, 4))[1], tdac=TdacConfig(trajectories=1),
        reconstruction=ReconstructionConfig(iters=0),
    )  # fmt: skip
    result = compile_source(made, config, LineProgress(), quality=False)
    write(to_artifact(result, build(result.lowered, DeviceOptions(targets, batches), LineProgress())), output)
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Compile, measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", choices=CONFIGS, default="cifar10")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--bits", type=int, default=4, help="of the weights")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument(
        "--slow", default="torch.compile reduce-overhead fp16,torch.compile fp16",
        help="baselines that take minutes to be ready, comma-separated; '' for none",
    )  # fmt: skip
    parser.add_argument(
        "--ready", type=Path, metavar="FILE",
        help="of compiled_baselines: of --slow only what is in torch's cache, for each batch size, in one pass",
    )  # fmt: skip
    parser.add_argument("--quick", help="other baselines, comma-separated (default: all)")
    parser.add_argument("--keep", type=Path, help="keep the compiled file here; one that is there is not made again")
    parser.add_argument("--compile-only", metavar="ARCH", help="only make that file, for an architecture; needs no GPU")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    batches = tuple(int(b) for b in args.batch.split(","))
    if args.compile_only:
        if args.keep is None:
            parser.error("--compile-only needs --keep")
        compile_model(args.model, source(args.model), args.keep, batches, (args.compile_only,), args.bits)
        return
    if args.out is None:
        parser.error("--out is needed")
    name, targets = ("tiny", ()) if args.dry_run else (args.model, (arch_of(0),))
    device = pick_device("cpu" if args.dry_run else "cuda")
    made = source(name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or Path(folder) / f"{name}.qmod"
        seconds = None if path.exists() else compile_model(name, made, path, batches, targets, args.bits)
        print(f"compiled in {seconds} s", flush=True)
        loaded, rounds = read(path), 2 if args.dry_run else args.repeats
        about = {"model": name, "bits": args.bits, "compile_seconds": seconds, "dry_run": args.dry_run}
        slow = [] if args.dry_run or not args.slow else args.slow.split(",")
        quick = _quick(args, device)
        if args.ready is not None:
            _with_ready(args, made, path, device, about)
            return
        options = bench.Options(batches, rounds, args.kernels, quick)
        result = bench.measure(path, loaded, made, options, device, LineProgress())
        _write(args.out, result | about)
        if not slow:
            return
        for i, batch in enumerate(batches):  # what is there so far is safe
            options = bench.Options((batch,), rounds, baselines=[*quick, *slow])
            again = bench.measure(path, loaded, made, options, device, LineProgress())
            result["batches"][i] = again["batches"][0]
            _write(args.out, result | about)


def _with_ready(args: argparse.Namespace, made: Source, path: Path, device: Device, about: dict[str, Any]) -> None:
    """Each batch size once, with the baselines that `compiled_baselines` got ready for it; then launches alone."""
    loaded, groups = read(path), []
    batches = tuple(int(b) for b in args.batch.split(","))
    for batch in batches:
        names = _quick(args, device) + [n for n in ready(args.ready, args.model, batch) if n in args.slow.split(",")]
        options = bench.Options((batch,), args.repeats, baselines=names)
        found = bench.measure(path, loaded, made, options, device, LineProgress())
        groups += found["batches"]
        result = {**found, **about, "batches": groups}
        _write(args.out, result)
    if args.kernels:
        _write(args.out, {**result, "kernels": all_launches(loaded, batches, LineProgress())})


def _quick(args: argparse.Namespace, device: Device) -> list[str]:
    if args.quick is not None:
        return [name for name in args.quick.split(",") if name]
    return [name for name in BASELINES[device.kind] if "compile" not in name]


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["batches"]), flush=True)


if __name__ == "__main__":
    main()
