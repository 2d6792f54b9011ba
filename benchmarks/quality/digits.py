"""Quality of compiled digits models against the float model and against round-to-nearest.

    python benchmarks/quality/digits.py --out benchmarks/results/NAME/digits_quality.json

For each configuration: noise-prediction SQNR over whole float trajectories from fresh noise (never seen in
calibration), PSNR of final images from the same noise, share of conditional samples that the example's classifier
recognises as intended, and the Fréchet distance of its features to the real digits. The float model is measured on the
same noise. The main figures of a row are those of the reference engine; `onnxruntime` holds the same for ONNX Runtime on
the same file, the agreement of its images with the reference engine's, and what `export` says of the ONNX file. Compile
time is the wall time of the whole pipeline.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.calibration.sampler import draw_conditions, draw_noise, sample
from edadm_compile.config import PRESETS, QuantConfig
from edadm_compile.driver.compile import to_artifact
from edadm_compile.driver.export import export_onnx
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.evaluate.metrics import frechet, psnr
from edadm_compile.frontend import load_source
from edadm_compile.passes.base import Silent
from edadm_compile.pipeline import compile_source
from edadm_compile.report.truth import totals, truth_table
from edadm_compile.runtime.artifact import write
from edadm_compile.runtime.session import load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digits"
#: name -> (preset, further settings)
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8": ("w8a8", {}),
    "w4a8": ("w4a8", {}),
    "w8a8-minmax": ("w8a8", {"method": "minmax"}),
    "w4a8-minmax": ("w4a8", {"method": "minmax"}),
    "w4a8-uniform": ("w4a8", {"uniform": True}),
    "w8a8-deploy": ("w8a8", {"deploy": "onnxruntime"}),
    "w4a8-deploy": ("w4a8", {"deploy": "onnxruntime"}),
}
#: Far from any seed a compilation uses.
EVALUATION_SEED = 20_261_122


def main() -> None:
    """Run the chosen configurations and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--seed", type=int, default=0, help="seed of the compilations")
    parser.add_argument("-n", type=int, default=500, help="conditional samples for accuracy and Fréchet distance")
    parser.add_argument("--trajectories", type=int, default=32, help="fresh trajectories for the SQNR")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Benchmark(args.n, args.trajectories)
    results: dict[str, Any] = {
        "machine": machine(),
        "n": args.n,
        "trajectories": args.trajectories,
        "seed": args.seed,
        "rows": {},
    }
    results["rows"]["float"] = bench.float_row()
    for name in args.only:
        results["rows"][name] = bench.row(name, args.seed)
        args.out.write_text(json.dumps(results, indent=1) + "\n")  # after each: an interruption keeps what is done
        print(name, json.dumps(results["rows"][name]), flush=True)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
    }


class Benchmark:
    """Shared noise, reference samples and classifier."""

    def __init__(self, n: int, trajectories: int) -> None:
        classifier = _module("classifier")
        self.classifier = classifier.load_classifier(EXAMPLE / "classifier.safetensors")
        self.real = classifier.load_real_digits()[0]
        self.source = load_source(EXAMPLE / "model.pt")
        self.float_model = self.source.denoiser()
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.noise = draw_noise(self.source.signature, n, generator)
        self.labels = torch.arange(n) % 10
        self.fresh = draw_noise(self.source.signature, trajectories, generator)
        self.fresh_conditions = draw_conditions(self.source.signature, trajectories, generator)
        self.images = self._sample(self.float_model)

    def _sample(self, model: Any) -> Tensor:
        batches = zip(self.noise.split(50), self.labels.split(50), strict=True)
        return torch.cat([sample(model, self.source.sampler, x, [y]) for x, y in batches]).clamp(-1, 1)

    def features(self, images: Tensor) -> Tensor:
        """What Fréchet distances compare: features [N, D] of the example's classifier."""
        found: Tensor = self.classifier.features(images)
        return found

    def _judge(self, images: Tensor) -> dict[str, float]:
        with torch.no_grad():
            right = (self.classifier(images).argmax(dim=1) == self.labels).double().mean()
            distance = frechet(self.classifier.features(images), self.classifier.features(self.real))
        return {"recognised_percent": 100 * float(right), "frechet_to_real": distance}

    def float_row(self) -> dict[str, Any]:
        """The float model itself."""
        return self._judge(self.images)

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """Compile one configuration, write and load the file, and measure what was loaded."""
        preset, settings = CONFIGURATIONS[name]
        weight_bits, act_bits = PRESETS[preset]
        config = QuantConfig(weight_bits, act_bits, seed=seed, **settings)
        start = time.perf_counter()
        result = compile_source(self.source, config, Silent())
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "digits.qmod"
            size = write(to_artifact(result), path)
            reference, images = self.measure(load(path, engine="reference").predict)
            runtime, other = self.measure(load(path, engine="onnxruntime").predict)
            exported = self._export(path)
        return {
            **reference,
            "onnxruntime": {**runtime, **self._agreement(images, other), "export": exported},
            "average_weight_bits": result.stats["assign_widths"]["average_bits"],
            "weights_ratio_to_fp16": totals(truth_table(result.lowered, config.name))["ratio_to_fp16"],
            "file_bytes": size,
            "compile_seconds": seconds,
        }

    def measure(self, model: Any) -> tuple[dict[str, float], Tensor]:
        noise = compare_noise(self.float_model, model, self.source.sampler, self.fresh, self.fresh_conditions)
        images = self._sample(model)
        distances = psnr(self.images, images)
        found = {
            "sqnr_db": noise.sqnr,
            "sqnr_without_last_step_db": noise.sqnr_without_last,
            "worst_step_db": noise.worst,
            "psnr_median_db": float(distances.median()),
            "psnr_worst_db": float(distances.min()),
            **self._judge(images),
        }
        return found, images

    def _agreement(self, images: Tensor, other: Tensor) -> dict[str, float]:
        """Images of two engines from the same noise: the classifier's verdicts, and the distance."""
        with torch.no_grad():
            same = (self.classifier(images).argmax(dim=1) == self.classifier(other).argmax(dim=1)).double().mean()
        return {
            "same_digit_as_reference_engine_percent": 100 * float(same),
            "psnr_to_reference_engine_median_db": float(psnr(images, other).median()),
        }

    def _export(self, path: Path) -> dict[str, Any]:
        """The ONNX file: integer layers, largest error of a layer fed the same codes, sizes with INT8 and INT4 constants."""
        found = {
            kind: export_onnx(path, path.with_suffix(f".{kind}.onnx"), int4=kind == "int4") for kind in ("int8", "int4")
        }
        check = found["int8"]["check"]
        errors = {kind: [r["error"] for r in check["layers"] if r["output"] == kind and r["error"] is not None]
                  for kind in ("codes", "float")}  # fmt: skip
        return {
            "layers": check["counts"],
            "largest_difference_of_output_codes": max(errors["codes"], default=None),
            "largest_relative_error_of_float_outputs": max(errors["float"], default=None),
            "weights_ratio_to_fp32": {kind: result["weights"]["ratio"] for kind, result in found.items()},
            "file_bytes": {kind: result["bytes"] for kind, result in found.items()},
        }


def _module(name: str) -> Any:
    """Import a script of the example by path."""
    sys.path.insert(0, str(EXAMPLE))
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
