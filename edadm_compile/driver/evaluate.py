"""Quality of a compiled file against the float model it came from: predictions, images, distances, limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.calibration import sampler
from edadm_compile.callbacks import Dispatcher, Receiver
from edadm_compile.driver import evaluate_measures, evaluate_sets, shapes
from edadm_compile.driver.evaluate_sets import Judges, find_judges
from edadm_compile.driver.image_data import open_data
from edadm_compile.driver.options import load_options
from edadm_compile.driver.sample import chosen_sampler
from edadm_compile.driver.verify import same_inputs, same_model
from edadm_compile.errors import InputError, QualityError
from edadm_compile.evaluate import gates
from edadm_compile.evaluate.gates import Gate
from edadm_compile.evaluate.metrics import finite
from edadm_compile.evaluate.paired import Pairs, evaluation_seed, sample_pairs
from edadm_compile.frontend import Source, load_source
from edadm_compile.ir.program import SamplerSpec, Signature
from edadm_compile.parallel.world import World, divided
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.runtime.artifact import read
from edadm_compile.runtime.session import CompiledModel, from_artifact

#: Keywords of `evaluate_model` that say how to load the float model.
_SOURCE_OPTIONS = ("shape", "scheduler", "steps", "conditions", "factory", "trust_pickle",
                   "prompts", "pipeline", "original_config")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to measure, and with what.

    Attributes:
        count: images of each model.
        batch: images at a time.
        seed: of noise and conditions.
        engine: as in `edadm_compile.load`, or "cuda".
        data: folder of pictures or npz file with real images.
        features: extractor, see `edadm_compile.frontend.feature_file`.
        fail_below, fail_above: limits such as "sqnr=27,psnr=29".
    """

    count: int = 64
    batch: int = 32
    seed: int = 0
    engine: str | None = None
    data: Path | None = None
    features: Path | None = None
    fail_below: str | None = None
    fail_above: str | None = None


def run(
    artifact: Path,
    reference: Path,
    wanted: Options,
    progress: Progress | None = None,
    world: World | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a file.

    Args:
        reference: the float model that was compiled.
        world: processes that share the images of each batch; all of them get the result.
        options: how to load it; conditions, scheduler and steps are also those of the comparison.

    Returns:
        plain values: ``noise`` (dB over all steps, per step), ``images`` (PSNR, SSIM), ``distances`` (one row per pair
        of sets and feature space), ``left_out`` (what was not measured, and why), ``notes``, ``metrics`` (by the names
        that limits use), ``gates`` and ``failed`` (sentences; empty when every limit holds). An infinite dB value (equal
        predictions) is None.

    Raises:
        InputError: files or options that cannot be used, a limit on something that cannot be measured here.
        QualityError: images of the compiled model that are not finite.
        EdadmError: as `edadm_compile.load`.
    """
    progress = progress or Silent()
    limits = gates.parse(wanted.fail_below, "--fail-below") + gates.parse(wanted.fail_above, "--fail-above")
    _check_numbers(wanted)
    device = "cuda" if wanted.engine == "cuda" else "cpu"
    whole = read(artifact, device_code=device != "cpu")
    chosen, options = shapes.choose(whole, options)
    model = from_artifact(chosen, device, wanted.engine)
    shape = model.signature.inputs[0].shape
    data = None if wanted.data is None else open_data(wanted.data, shape)
    spec = chosen_sampler(model, options)
    source = load_source(reference, load_options(options, spec))
    same_inputs(source, model.artifact)
    judges = find_judges(shape, wanted.count, reference, wanted.features, data)
    _check_measurable(limits, judges)
    spaces = evaluate_sets.open_spaces(judges, progress)
    pairs = _pairs(model, source, spec, wanted, progress, world or World())
    progress.stage("distances", None)
    images, metrics = evaluate_measures.images(pairs, judges)
    sets = {"quantized": pairs.candidate.clamp(-1, 1), "float": pairs.reference.clamp(-1, 1)}
    distances, more = evaluate_sets.measure(spaces, sets)
    metrics = evaluate_measures.noise_metrics(pairs) | metrics | more
    return {
        "artifact": str(artifact), "reference": str(reference), "same_model": same_model(source, model.artifact),
        "engine": model.engine_name, "scheduler": spec.scheduler["_class_name"], "steps": spec.steps,
        **shapes.told(whole, chosen), "count": wanted.count, "batch": wanted.batch, "seed": wanted.seed, "shape": list(shape),
        "data": None if data is None else {"path": str(data.path), "images": len(data)},
        "features": None if judges.extractor is None else str(judges.extractor.path),
        "noise": evaluate_measures.noise(pairs), "images": images, "distances": distances,
        "left_out": judges.left_out, "notes": evaluate_measures.notes(pairs, distances, spec, model.sampler),
        "metrics": finite(metrics),
        "gates": finite(gates.judge(limits, metrics)),
        "failed": gates.failures(limits, metrics),
    }  # fmt: skip


def _pairs(
    model: CompiledModel, source: Source, spec: SamplerSpec, wanted: Options, progress: Progress, world: World
) -> Pairs:
    """Images and predictions of both models from fresh noise."""
    x, conditions = _draw(model.signature, spec, wanted, source.conditions)
    steps = len(sampler.timesteps(spec))
    progress.stage("trajectories", 2 * steps * math.ceil(wanted.count / wanted.batch))
    pairs = sample_pairs(
        divided(source.denoiser(), world), divided(_on_host(model), world), spec, x, conditions, batch=wanted.batch,
        seed=evaluation_seed(wanted.seed), advance=progress.advance,
    )  # fmt: skip
    _check_finite(pairs)
    return pairs


def evaluate_model(
    artifact: str | Path,
    reference: str | Path,
    *,
    count: int = 64,
    batch: int = 32,
    seed: int = 0,
    engine: str | None = None,
    data: str | Path | None = None,
    features: str | Path | None = None,
    fail_below: str | None = None,
    fail_above: str | None = None,
    callbacks: Receiver | Sequence[Receiver] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Measure the quality of a ``.qmod`` file against its float model; arguments as in `Options`, result as of `run`.

    A missed limit is listed in ``failed`` of the result; `check` raises for it.

    Args:
        callbacks: as of `edadm_compile.compile_model`.
        options: how to load the float model: `_SOURCE_OPTIONS`, as on the command line (``shape="3,32,32"``).

    Raises:
        EdadmError: as `run`.
    """
    unknown = sorted(set(options) - set(_SOURCE_OPTIONS))
    if unknown:
        raise InputError(f"evaluate_model: unknown option {unknown[0]!r}; allowed are {', '.join(_SOURCE_OPTIONS)}")
    wanted = Options(count, batch, seed, engine, _path(data), _path(features), fail_below, fail_above)
    return run(Path(artifact), Path(reference), wanted, Dispatcher(callbacks), **options)


def check(result: Mapping[str, Any]) -> None:
    """Refuse quality beyond a limit.

    Raises:
        QualityError: naming what was found and what was asked, for every limit that was missed.
    """
    if result["failed"]:
        raise QualityError(f"quality gate failed: {'; '.join(result['failed'])}")


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _check_numbers(wanted: Options) -> None:
    for name, value in (("-n", wanted.count), ("--batch", wanted.batch)):
        if value < 1:
            raise InputError(f"{name}: got {value}, allowed 1 or more")
    if not 0 <= wanted.seed <= 1_000_000:
        raise InputError(f"--seed: got {wanted.seed}, allowed 0 to 1000000")


def _check_measurable(limits: list[Gate], judges: Judges) -> None:
    """A limit on what cannot be measured must not pass in silence; said before any work."""
    for gate in limits:
        for part in gate.needs.split(" and "):
            if part in judges.left_out:
                option = "--fail-below" if gate.below else "--fail-above"
                raise InputError(f"{option} {gate.metric}: cannot be measured here: {judges.left_out[part]}")


def _draw(
    signature: Signature, spec: SamplerSpec, wanted: Options, pool: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Fresh noise, and conditions as calibration draws them."""
    for condition in signature.conditions:
        if condition.num_classes is not None and condition.name in pool:
            low, high = int(pool[condition.name].min()), int(pool[condition.name].max())
            if low < 0 or high >= condition.num_classes:
                allowed = f"allowed 0 to {condition.num_classes - 1}"
                raise InputError(f"--cond: {condition.name} holds {low} to {high}, {allowed}")
    generator = torch.Generator().manual_seed(evaluation_seed(wanted.seed))
    x = sampler.draw_noise(signature, wanted.count, generator)
    return x, sampler.draw_conditions(signature, wanted.count, generator, pool, spec.null)


def _on_host(model: CompiledModel) -> Any:
    """The compiled model with results on the CPU, where the sampler and the float model are."""
    return lambda x, t, *conditions: model.predict(x, t, *conditions).cpu()


def _check_finite(pairs: Pairs) -> None:
    broken = int((~pairs.reference.isfinite().flatten(1).all(dim=1)).sum())
    if broken:
        raise InputError(f"--reference: {broken} of {len(pairs.reference)} images of the float model are not finite")
    broken = int((~pairs.candidate.isfinite().flatten(1).all(dim=1)).sum())
    if broken:
        raise QualityError(f"{broken} of {len(pairs.candidate)} images of the compiled model are not finite")
    for t, value in zip(pairs.timesteps, pairs.noise.per_step, strict=True):
        if math.isnan(value) or value == -math.inf:
            raise QualityError(
                f"there is no SQNR at timestep {t:g}: the float model predicts exactly 0 there, or the compiled model "
                "predicts values that are not finite"
            )
