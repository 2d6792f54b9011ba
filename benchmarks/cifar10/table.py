"""Methods x widths on a CIFAR-10 UNet, with a distance to the real images: one table, as JSON, CSV and a plot.

    python -m benchmarks.cifar10.table --model DIR/model --data cifar10.npz --classifier features.pt --out NAME

Cells, budget, resumption and files are those of ``benchmarks/quality/methods.py``; all methods and widths with
``--only`` and ``--widths`` left out, 10,000 samples with ``-n 10000``. The feature space is, in this order: an extractor
given with ``--features`` (see docs/inputs.md), Inception's where its weights lie on this machine (the distance is then
FID), the classifier of ``features.py``. The JSON file says which under ``budget``. The real images are those of ``--data``,
at most ``--real`` of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cifar10.data import load_images, scaled
from benchmarks.cifar10.features import load_classifier
from benchmarks.quality import methods
from benchmarks.quality.digits import EVALUATION_SEED
from edadm_compile.calibration.guidance import labels_in_turn
from edadm_compile.calibration.sampler import draw_conditions, draw_noise, sample
from edadm_compile.evaluate import pretrained
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.evaluate.metrics import frechet, psnr
from edadm_compile.frontend import LoadOptions, load_source
from edadm_compile.frontend.feature_file import load_extractor

_BATCH = 100
_SHAPE = (3, 32, 32)


class Benchmark:
    """Shared noise, the float model's samples, and the space that distances are measured in.

    Args:
        space: "inception", or the path of an extractor (.pt2) or of a classifier.
    """

    def __init__(self, model: Path, data: Path, space: str, steps: int | None, real: int, n: int, trajectories: int):
        self.source = load_source(model, LoadOptions(steps=steps))
        self.extract, self.classify = _space(space)
        signature, spec = self.source.signature, self.source.sampler
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.noise = draw_noise(signature, n, generator)
        self.labels = [labels_in_turn(n, c.num_classes or 0, None) for c in signature.conditions]
        self.fresh = draw_noise(signature, trajectories, generator)
        self.fresh_conditions = draw_conditions(signature, trajectories, generator, self.source.conditions, spec.null)
        self.float_model = self.source.denoiser()
        self.real = self.features(scaled(load_images(data).pixels[:real]))
        self.images = self._sample(self.float_model)

    def features(self, images: Tensor) -> Tensor:
        """[N, D] of images float32 [N, 3, 32, 32] in [-1, 1]."""
        with torch.no_grad():
            return torch.cat([self.extract(part) for part in images.split(_BATCH)])

    def _sample(self, model: Any) -> Tensor:
        parts = []
        for rows in torch.arange(len(self.noise)).split(_BATCH):
            given = [c[rows] for c in self.labels]
            parts.append(sample(model, self.source.sampler, self.noise[rows], given))
        return torch.cat(parts).clamp(-1, 1)

    def measure(self, model: Any) -> tuple[dict[str, float], Tensor]:
        """Figures of a predictor, and its images."""
        noise = compare_noise(self.float_model, model, self.source.sampler, self.fresh, self.fresh_conditions)
        images = self.images if model is self.float_model else self._sample(model)
        found = {
            "sqnr_db": noise.sqnr, "sqnr_without_last_step_db": noise.sqnr_without_last, "worst_step_db": noise.worst,
            "psnr_median_db": float(psnr(self.images, images).median()), "frechet_to_real": self.to_real(images),
        }  # fmt: skip
        if self.classify is not None and self.labels:
            found["recognised_percent"] = self.recognised(images)
        return found, images

    def to_real(self, images: Tensor) -> float:
        """Fréchet distance of the features to those of the real images."""
        return frechet(self.features(images), self.real)

    def recognised(self, images: Tensor) -> float:
        """Share of the samples that the classifier takes for the class they were asked for, percent."""
        assert self.classify is not None
        with torch.no_grad():
            found = torch.cat([self.classify(part).argmax(dim=1) for part in images.split(_BATCH)])
        return 100 * float((found == self.labels[0]).double().mean())


def _space(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """Features of images, and logits where there is a classifier."""
    if name == "inception":
        network = pretrained.inception()
        return lambda images: network(images)[0], None
    if name.endswith(".pt2"):
        return load_extractor(Path(name), _SHAPE), None
    classifier = load_classifier(Path(name))
    return classifier.features, classifier


def _chosen_space(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    if args.features is not None:
        return str(args.features)
    missing = pretrained.inception_missing(_SHAPE)
    if not missing:
        return "inception"
    if args.classifier is None:
        parser.error(f"no feature space: {missing}; give --classifier (benchmarks/cifar10/features.py) or --features")
    return str(args.classifier)


def main(argv: list[str] | None = None) -> None:
    """The float model's own distance first, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    methods.add_options(parser)
    parser.add_argument("--model", type=Path, required=True, help="diffusers folder, see benchmarks/cifar10/train.py")
    parser.add_argument("--data", type=Path, required=True, help="npz file of real images")
    parser.add_argument("--features", type=Path, help="feature extractor .pt2")
    parser.add_argument("--classifier", type=Path, help="file of benchmarks/cifar10/features.py")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the model's, else 50)")
    parser.add_argument("--real", type=int, default=20_000, help="most real images")
    args = parser.parse_args(argv)
    space = _chosen_space(args, parser)
    given = (args.model, args.data, space, args.steps, args.real, args.n, args.trajectories)
    torch.set_num_threads(args.jobs)
    bench = Benchmark(*given)
    about = {"model": str(args.model.name), "space": Path(space).name, "steps": bench.source.sampler.steps}
    about |= {"real": len(bench.real)}
    floating = {"frechet_to_real": bench.to_real(bench.images)}
    if bench.classify is not None and bench.labels:
        floating["recognised_percent"] = bench.recognised(bench.images)
    print("float model:", floating, about, flush=True)
    methods.complete(parser, args, methods.METHODS, (Benchmark, given), about, floating)


if __name__ == "__main__":
    main()
