"""What it costs to keep cached activations of reconstruction in 16 bits.

    python benchmarks/quality/cache_types.py --out benchmarks/results/NAME/cache_types.json

Compiles the digits model with every cached value rounded to a type before it is read: the float targets alone, or all
values between blocks of both models. The figure is the noise SQNR of the compiled model on fresh trajectories, which the
compilation measures itself, and the spread over seeds says what a difference means.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from edadm_compile.config import QuantConfig, ReconstructionConfig, TdacConfig
from edadm_compile.driver.compile import compile_model
from edadm_compile.passes.streams import Streams

MODEL = Path(__file__).parents[2] / "examples" / "digits" / "model.pt"
#: Name, the method of `Streams` whose results are rounded, and the type.
VARIANTS = (
    ("float32", None, torch.float32),
    ("targets in bfloat16", "float_targets", torch.bfloat16),
    ("targets in float16", "float_targets", torch.float16),
    ("all in bfloat16", "run", torch.bfloat16),
    ("all in float16", "run", torch.float16),
)


@contextmanager
def rounded(method: str | None, dtype: torch.dtype) -> Iterator[None]:
    """Round what a method of the streams returns, as storing it would."""
    if method is None:
        yield
        return
    real = getattr(Streams, method)

    def run(self: Streams, *args: Any) -> dict[fx.Node, Tensor]:
        found: dict[fx.Node, Tensor] = real(self, *args)
        for value in found.values():
            if value.dtype == torch.float32:
                value.copy_(value.to(dtype))
        return found

    with mock.patch.object(Streams, method, run):
        yield


def measure(
    seeds: Sequence[int], iters: int, samples: int, steps: int, widths: tuple[int, int]
) -> list[dict[str, Any]]:
    """A row for each variant."""
    rows = []
    for name, method, dtype in VARIANTS:
        found = []
        for seed in seeds:
            config = QuantConfig(
                *widths,
                seed=seed,
                calib_samples=samples,
                tdac=TdacConfig(trajectories=8),
                reconstruction=ReconstructionConfig(iters=iters),
            )
            with rounded(method, dtype):
                result = compile_model(MODEL, config, steps=steps)
            assert result.quality is not None
            found.append(result.quality.sqnr)
        row = {"caches": name, "sqnr_db": [round(v, 3) for v in found], "mean": round(statistics.fmean(found), 3)}
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--calib-samples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    found = parser.parse_args()
    settings = {"seeds": found.seeds, "iters": found.iters, "samples": found.calib_samples, "steps": found.steps}
    rows = measure(range(found.seeds), found.iters, found.calib_samples, found.steps, (4, 8))
    record = {"model": MODEL.name, "widths": "w4a8", **settings, "torch": torch.__version__, "rows": rows}
    found.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
