"""What a report says, as plain values: what the file knows, and what the reference and this machine add."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from edadm_compile.calibration import sampler
from edadm_compile.config import from_dict
from edadm_compile.driver.layer_times import layer_times
from edadm_compile.driver.report_images import GAIN, image_pairs
from edadm_compile.driver.verify import same_inputs, same_model
from edadm_compile.errors import ArtifactError, ConfigError, QualityError
from edadm_compile.evaluate.activation_ranges import QUANTILES, RangeRecorder, quantizer_ranges
from edadm_compile.evaluate.metrics import finite
from edadm_compile.evaluate.paired import Pairs, evaluation_seed, sample_pairs
from edadm_compile.frontend import Source
from edadm_compile.ir.program import Program, text_of
from edadm_compile.passes.base import Context, Progress, Silent, run_passes
from edadm_compile.passes.layer_roles import annotate, apply_rules
from edadm_compile.passes.sensitivity import MEASURE_LIMIT
from edadm_compile.pipeline import capture, float_passes
from edadm_compile.report.tables import inspect_report
from edadm_compile.runtime.artifact import Artifact
from edadm_compile.runtime.engines import make_engine

#: Pairs of images of a report, and of one for a model above `MEASURE_LIMIT` parameters.
PAIRS, PAIRS_LARGE = 16, 2
_NO_REFERENCE = "needs the float model: edadm-compile report FILE --reference MODEL"


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        artifact: the compiled file.
        name: of the file, without folder.
        size: in bytes.
        sha256: of the file.
        source: the float model; None where none was given.
        reference: name of its file.
        seconds: of each stage of the compilation; None for a report that was made later.
        shapes: [C, H, W] of x for every shape in the file, of which `artifact` is one; the first is the one that was
            calibrated and measured. Empty: that of `artifact` alone.
    """

    artifact: Artifact
    name: str
    size: int
    sha256: str
    source: Source | None = None
    reference: str = ""
    seconds: dict[str, float] | None = None
    shapes: tuple[tuple[int, ...], ...] = ()


def gather(
    subject: Subject, count: int | None = None, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Everything a report shows.

    Args:
        count: pairs of images and trajectories; None for `PAIRS`, or `PAIRS_LARGE` for a large model.
        seed: of the noise, set apart from that of compilations.

    Returns:
        plain values; ``missing`` names what is not there and why.

    Raises:
        InputError: a reference with other inputs.
        ArtifactError: a manifest whose record of the compilation is malformed.
        QualityError: images of the compiled model that are not finite.
    """
    progress = progress or Silent()
    loaded = subject.artifact
    progress.stage("report: time by layer", None)
    facts: dict[str, Any] = {
        "file": {"name": subject.name, "bytes": subject.size, "sha256": subject.sha256},
        **inspect_report(loaded, subject.size),
        "notes": list(loaded.lowered.notes),
        "times": layer_times(loaded, seed),
        "seconds": subject.seconds,
        "reference": None, "samples": None, "ranges": None, "noise": None,
    }  # fmt: skip
    facts |= _recorded(loaded)
    if len(subject.shapes) > 1:
        facts["shapes"] = [list(shape) for shape in subject.shapes]
        facts["notes"].append(_about(subject))
    if subject.source is not None:
        facts |= _compared(subject, count, seed, progress)
    facts["missing"] = _missing(facts)
    return dict(finite(facts))


def _about(subject: Subject) -> str:
    """Which of the shapes of a file the page is about, and which one the record of the compilation."""
    shape, first = subject.artifact.shapes[0], subject.shapes[0]
    measured = "" if shape == first else f"; what was recorded while compiling is of {text_of(first)}"
    return f"figures of this page are for {text_of(shape)}, one of {len(subject.shapes)} shapes in the file: " + (
        f"{'; '.join(map(text_of, subject.shapes))}{measured}"
    )


def _recorded(loaded: Artifact) -> dict[str, Any]:
    """What the compilation left in the manifest."""
    manifest = loaded.manifest
    mixed = manifest.get("mixed_precision")
    sensitivity = manifest.get("sensitivity")
    if sensitivity is None and mixed and mixed.get("measured"):
        sensitivity = {row["layer"]: max(row["errors"].values()) for row in mixed["layers"]}
    quality = manifest.get("quality")
    noise = None
    if quality is not None:
        steps = sampler.timesteps(loaded.lowered.sampler)
        noise = {**quality, "timesteps": steps, "where": "measured while compiling, on 16 trajectories of fresh noise"}
    found = {
        "selection": manifest.get("selection"), "units": manifest.get("units") or [], "sensitivity": sensitivity,
        "noise": noise,
    }  # fmt: skip
    _check(found, manifest.get("allocation"))
    return found


#: Entries of the record of the selection that are no list.
_NO_LISTS = ("radius", "given")


def _check(found: dict[str, Any], allocation: Any) -> None:
    """Refuse records that a chart cannot be made of.

    Raises:
        ArtifactError: naming the record.
    """
    lists = {"allocation": allocation or []}
    if found["selection"] is not None:
        lists |= {f"selection.{k}": v or [] for k, v in found["selection"].items() if k not in _NO_LISTS}
    if found["noise"] is not None:
        lists["quality.per_step"] = [v for v in found["noise"]["per_step"] if v is not None]
    lists["sensitivity"] = list((found["sensitivity"] or {}).values())
    lists["units"] = [unit.get(k) for unit in found["units"] for k in ("before", "after")]
    for name, values in lists.items():
        if not isinstance(values, list) or any(type(v) not in (int, float) for v in values):
            raise ArtifactError(f"report: the manifest's {name} is not a list of numbers; recompile the model")


def _compared(subject: Subject, count: int | None, seed: int, progress: Progress) -> dict[str, Any]:
    """Images, predictions and activation ranges from the same noise."""
    source, loaded = subject.source, subject.artifact
    assert source is not None
    same_inputs(source, loaded)
    source = dataclasses.replace(source, sampler=loaded.lowered.sampler)
    count = count or (PAIRS_LARGE if source.parameters() > MEASURE_LIMIT else PAIRS)
    progress.stage("report: float model", None)
    recorder = RangeRecorder(_annotated(source, loaded))
    engine = make_engine(None, "cpu", loaded)
    generator = torch.Generator().manual_seed(evaluation_seed(seed))
    signature, spec = loaded.lowered.signature, source.sampler
    x = sampler.draw_noise(signature, count, generator)
    conditions = sampler.draw_conditions(signature, count, generator, source.conditions, spec.null)
    progress.stage("report: trajectories", 2 * len(sampler.timesteps(spec)))
    pairs = sample_pairs(
        recorder, engine, spec, x, conditions, batch=count, seed=evaluation_seed(seed), advance=progress.advance
    )
    if not bool(torch.isfinite(pairs.candidate).all()):
        raise QualityError("report: images of the compiled model are not finite; see edadm-compile verify")
    where = f"measured for this report on {count} trajectories of fresh noise, {engine.name} engine"
    return {
        "reference": {"name": subject.reference, "same_model": same_model(source, loaded)},
        "samples": _samples(pairs, signature.inputs[0].shape[0], engine.name, seed),
        "noise": {**dataclasses.asdict(pairs.noise), "timesteps": list(pairs.timesteps), "where": where},
        "ranges": _ranges(recorder, loaded.qdq, pairs),
    }


def _annotated(source: Source, loaded: Artifact) -> Program:
    """The float program that was quantized, with the records of its layers."""
    try:
        config = from_dict(loaded.manifest["config"], "the file's configuration")
    except (KeyError, ConfigError) as error:
        raise ArtifactError(f"report: the file's configuration is not understood: {error}") from None
    program = run_passes(capture(source), float_passes(), Context(config))
    annotate(program, config)
    apply_rules(program, config.rules)
    return program


def _samples(pairs: Pairs, channels: int, engine: str, seed: int) -> dict[str, Any]:
    images = image_pairs(pairs.reference, pairs.candidate)
    values = sorted(p["psnr_db"] for p in images)
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    return {
        "images": images, "gain": GAIN, "engine": engine, "seed": seed, "side": max(pairs.reference.shape[2:]),
        "latent": channels > 3,
        "psnr_db": {"median": median, "mean": sum(values) / len(values), "worst": values[0]},
    }  # fmt: skip


def _ranges(recorder: RangeRecorder, qdq: Program, pairs: Pairs) -> dict[str, Any]:
    limits = quantizer_ranges(qdq)
    layers = [
        {
            "layer": name, "quantizer": None if name not in limits else [_digits(v) for v in limits[name]],
            **{key: [_digits(v) for v in values] for key, values in vars(found).items()},
        }
        for name, found in recorder.ranges.items()
    ]  # fmt: skip
    return {"timesteps": list(pairs.timesteps), "quantiles": list(QUANTILES), "layers": layers}


def _digits(value: float) -> float:
    """Four digits: enough for a curve."""
    return float(f"{value:.4g}")


def _missing(facts: dict[str, Any]) -> list[dict[str, str]]:
    """What this report does not show, and what it would take."""
    found = []
    if facts["samples"] is None:
        found += [{"what": w, "why": _NO_REFERENCE} for w in ("Images from the same noise", "Activation ranges")]
    if facts["noise"] is None:
        found.append({"what": "Noise-prediction SQNR", "why": f"was not measured while compiling; {_NO_REFERENCE}"})
    older = "the file was made by a version that did not record it"
    selection = facts["selection"]
    if selection is None:
        found.append({"what": "Density and diversity curves", "why": older})
    elif selection["density"] is None:
        found.append({"what": "Density and diversity curves", "why": "the selection of this file does not score steps"})
    if not facts["units"]:
        found.append(
            {
                "what": "Loss of each block",
                "why": "nothing was reconstructed: the method or --iters 0 rounds to nearest",
            }
        )
    if facts["sensitivity"] is None:
        why = "not measured: at 8 bits, with --uniform and for methods with strict widths nothing is promoted"
        found.append({"what": "Sensitivity of each layer", "why": why})
    if facts["seconds"] is None:
        found.append(
            {"what": "Time of each compilation stage", "why": "only in a report made while compiling (--report)"}
        )
    return found
