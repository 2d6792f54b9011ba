"""What a compilation costs on several GPUs, computed from the network's shapes and the machine's data sheet.

    python -m benchmarks.scaling.roofline --out benchmarks/results/NAME/scaling_sd15.json

Nothing is run or measured: floating point operations are counted on a network without weights, bytes follow from the
parameters, and every stage takes the longer of its arithmetic and its bytes at the peak rates below, without overlap. Real
rates are lower; the ratios between the stages, and where dividing the work stops to pay, are what this is for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

#: H100 SXM, NVIDIA's data sheet: FP32 and dense TF32 operations per second, bytes per second of memory and of NVLink in one
#: direction; one 400 Gbit/s adapter per GPU between machines.
FP32, TF32, MEMORY, NVLINK, NETWORK = 67e12, 495e12, 3.35e12, 450e9, 50e9
#: Bytes of an optimizer step per rounding variable: Adam reads 4 float32 values and writes 3; the soft rounding and its
#: gradient read and write 8 more.
_PER_VARIABLE = 4 * (7 + 8)
#: Stable Diffusion 1.5: the unet's configuration as published.
SD15: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}  # fmt: skip


def counted() -> dict[str, float]:
    """Operations of one evaluation of one row, and weights, as a whole and in the largest residual or transformer block."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel(**SD15)
        inputs = (torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    blocks = [m for m in model.modules() if type(m).__name__ in ("ResnetBlock2D", "BasicTransformerBlock")]
    return {
        "flop_per_row": float(counter.get_total_flops()),
        "weights": float(sum(m.weight.numel() for m in layers)),
        "largest_block_weights": float(
            max(sum(m.weight.numel() for m in b.modules() if isinstance(m, (nn.Conv2d, nn.Linear))) for b in blocks)
        ),
    }


def stages(net: dict[str, float], args: argparse.Namespace, gpus: int, link: float, rate: float) -> dict[str, float]:
    """Seconds of each stage on `gpus` GPUs.

    Args:
        link: bytes per second between two GPUs, in one direction.
        rate: floating point operations per second.
    """
    row = net["flop_per_row"] / rate
    # Guidance doubles the rows. A sample's trajectory ends at its step, on average in the middle.
    collect = 2 * args.steps * (args.trajectories + args.samples / 2) * row / gpus
    observe = 2 * args.samples * row  # every process does the whole
    # Forward and backward of the quantized unit; the float and the quantized stream cost two forwards of the set, targets one.
    train = (3 * args.iters * args.batch + 3 * 2 * args.samples) * row / gpus
    step = args.iters * net["weights"] * _PER_VARIABLE / MEMORY  # every process steps all roundings of a unit
    # A ring moves each byte 2 (n - 1) / n times over every link.
    add = args.iters * 4 * net["weights"] * 2 * (gpus - 1) / gpus / link
    return {
        "collect": collect, "observe": observe, "train": train, "optimizer": step, "all_reduce": add,
        "total": collect + observe + train + step + add,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Count, compute, and write one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--trajectories", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args(argv)
    net = counted()
    found: dict[str, Any] = {
        "what": "computed from shapes and data sheets, not measured", "network": "Stable Diffusion 1.5 UNet", **net,
        "all_reduce_bytes_per_step": {"all_units": 4 * net["weights"], "largest_block": 4 * net["largest_block_weights"]},
        "settings": {k: v for k, v in vars(args).items() if k != "out"}, "seconds": {},
    }  # fmt: skip
    for name, gpus, link in (("1", 1, NVLINK), ("8", 8, NVLINK), ("16 on two machines", 16, NETWORK)):
        for kind, rate in (("fp32", FP32), ("tf32", TF32)):
            times = stages(net, args, gpus, link, rate)
            found["seconds"][f"{name}, {kind}"] = {k: round(v, 1) for k, v in times.items()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
