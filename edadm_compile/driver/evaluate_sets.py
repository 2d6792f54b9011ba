"""Distances between sets of images in a feature space: quantized, float and real."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.driver.image_data import ImageData
from edadm_compile.errors import InputError
from edadm_compile.evaluate import pretrained
from edadm_compile.evaluate.metrics import frechet, inception_score, kernel_distance
from edadm_compile.frontend.feature_file import BESIDE, Extractor, load_extractor
from edadm_compile.passes.base import Progress

_PAIRS = (("quantized", "float"), ("quantized", "data"), ("float", "data"))


@dataclass(frozen=True)
class Judges:
    """What there is to judge images with.

    Attributes:
        extractor: of features; None where none fits.
        data: real images; None where none were given.
        inception, lpips: whether package and weights are here.
        left_out: for each group of rows that cannot be measured, why.
    """

    extractor: Extractor | None
    data: ImageData | None
    inception: bool
    lpips: bool
    left_out: dict[str, str] = field(default_factory=dict)


def find_judges(
    shape: tuple[int, ...], count: int, reference: Path, features: Path | None, data: ImageData | None
) -> Judges:
    """Choose the extractor and find the pretrained networks.

    Args:
        shape: [C, H, W] of the images.
        count: images of each model.
        features: the user's extractor; None to look for one beside `reference`.

    Raises:
        InputError: the user's extractor cannot be used.
    """
    left_out: dict[str, str] = {}
    extractor, reason = _extractor(shape, reference, features)
    reasons = {"lpips": pretrained.lpips_missing(shape), "inception": pretrained.inception_missing(shape)}
    if count < 2:
        reason = reasons["inception"] = f"a distance between sets needs 2 or more images, -n is {count}"
        extractor = None
    left_out |= {"features": reason} if reason else {}
    left_out |= {name: text for name, text in reasons.items() if text}
    if data is None:
        left_out["data"] = "no real images were given (--data)"
    return Judges(extractor, data, "inception" not in left_out, "lpips" not in left_out, left_out)


def _extractor(shape: tuple[int, ...], reference: Path, features: Path | None) -> tuple[Extractor | None, str]:
    if features is not None:
        return load_extractor(features, shape), ""
    beside = (reference if reference.is_dir() else reference.parent) / BESIDE
    if not beside.exists():
        return None, f"no feature extractor: give one with --features FILE.pt2, or put {BESIDE} beside the reference"
    try:
        return load_extractor(beside, shape), ""
    except InputError as error:
        return None, f"the extractor beside the reference does not fit: {str(error).removeprefix('--features ')}"


_Embed = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Space:
    """A feature space.

    Attributes:
        name: of the extractor.
        embed: images float32 [N, C, H, W] → features float64 [N, d], and class logits where the extractor is a classifier.
        names: metric that each distance is called, see `edadm_compile.evaluate.gates`.
        data: features of the real images; None without any.
    """

    name: str
    embed: _Embed
    names: Mapping[str, str]
    data: Tensor | None


def open_spaces(judges: Judges, progress: Progress) -> list[Space]:
    """Every feature space there is, with the real images in it: unusable ones show before any sampling.

    Raises:
        InputError: real images that cannot be used, or features that are not finite.
    """
    spaces = []
    if judges.extractor is not None:
        extractor, names = judges.extractor, {"frechet": "frechet", "kid": "kid"}
        spaces.append(_space(extractor.path.name, lambda x: (extractor(x), None), names, judges.data, progress))
    if judges.inception:
        spaces.append(_space("inception-v3", pretrained.inception(), {"frechet": "fid"}, judges.data, progress))
    return spaces


def _space(name: str, embed: _Embed, names: Mapping[str, str], data: ImageData | None, progress: Progress) -> Space:
    return Space(name, embed, names, _of_data(embed, data, progress))


def _of_data(embed: _Embed, data: ImageData | None, progress: Progress) -> Tensor | None:
    if data is None:
        return None
    progress.stage("real images", len(data))
    parts = []
    for batch in data.batches():
        parts.append(embed(batch)[0])
        progress.advance(len(batch))
    return torch.cat(parts)


def measure(spaces: list[Space], images: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Distances of quantized, float and real images in every feature space.

    Args:
        images: "quantized" and "float", float32 [N, C, H, W], row by row from the same noise.

    Returns:
        one row per space and pair (between, features, dimension, samples, frechet, kid and its standard error), and the
        metrics with names as in `edadm_compile.evaluate.gates`.
    """
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for space in spaces:
        embedded = {name: space.embed(values) for name, values in images.items()}
        features = {name: values for name, (values, _) in embedded.items()}
        if space.data is not None:
            features["data"] = space.data
        found = _rows(space.name, features)
        metrics |= _named(found, space.names)
        rows += found
        if (logits := embedded["quantized"][1]) is not None:
            metrics["inception_score"] = inception_score(logits)
    return rows, metrics


def _rows(space: str, features: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for a, b in _PAIRS:
        if a in features and b in features:
            first, second = features[a], features[b]
            rows.append(
                {
                    "between": [a, b], "features": space, "dimension": first.shape[1],
                    "samples": [len(first), len(second)], "frechet": max(0.0, frechet(first, second)),
                    **_kid(first, second, paired=b == "float"),
                }
            )  # fmt: skip
    return rows


def _kid(first: Tensor, second: Tensor, *, paired: bool) -> dict[str, float]:
    value, error = kernel_distance(first, second, paired=paired)
    return {"kid": value, "kid_standard_error": error}


def _named(rows: list[dict[str, Any]], names: Mapping[str, str]) -> dict[str, float]:
    """Metrics of the quantized model: to the float model under a plain name, to the data with ``_data``."""
    suffix = {"float": "", "data": "_data"}
    return {
        f"{name}{suffix[row['between'][1]]}": row[key]
        for row in rows
        if row["between"][0] == "quantized"
        for key, name in names.items()
    }
