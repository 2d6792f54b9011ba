"""What `evaluate` says of pairs of trajectories, as plain values."""

from __future__ import annotations

from typing import Any

from edadm_compile.driver.evaluate_sets import Judges
from edadm_compile.evaluate import pretrained
from edadm_compile.evaluate.metrics import finite, psnr
from edadm_compile.evaluate.paired import Pairs
from edadm_compile.evaluate.similarity import WINDOW, ssim, window_for
from edadm_compile.ir.program import SamplerSpec

#: Pixels overshoot [-1, 1] a little; where more than this share is beyond this size, they are probably latents.
_FAR, _FAR_SHARE = 1.25, 0.01


def noise_metrics(pairs: Pairs) -> dict[str, float]:
    """SQNR by the names that limits use, dB."""
    noise = pairs.noise
    return {"sqnr": noise.sqnr, "sqnr_without_last": noise.sqnr_without_last, "sqnr_worst_step": noise.worst}


def noise(pairs: Pairs) -> dict[str, Any]:
    """SQNR of the predictions over all steps and per step."""
    found = pairs.noise
    steps = [
        {"step": i, "timestep": t, "sqnr_db": finite(value)}
        for i, (t, value) in enumerate(zip(pairs.timesteps, found.per_step, strict=True))
    ]
    worst = found.per_step.index(found.worst)
    return {
        "sqnr_db": finite(found.sqnr), "sqnr_without_last_step_db": finite(found.sqnr_without_last),
        "worst_step": steps[worst], "per_step": steps,
    }  # fmt: skip


def images(pairs: Pairs, judges: Judges) -> tuple[dict[str, Any], dict[str, float]]:
    """Differences of images from the same noise, and the metrics among them."""
    decibels, similarity = psnr(pairs.reference, pairs.candidate), ssim(pairs.reference, pairs.candidate)
    found = {
        "psnr": float(decibels.mean()), "psnr_median": float(decibels.quantile(0.5)), "psnr_worst": float(decibels.min()),
        "ssim": float(similarity.mean()), "ssim_worst": float(similarity.min()),
    }  # fmt: skip
    images: dict[str, Any] = {
        "psnr_db": {"mean": found["psnr"], "median": found["psnr_median"], "worst": found["psnr_worst"]},
        "ssim": {"mean": found["ssim"], "median": float(similarity.quantile(0.5)), "worst": found["ssim_worst"]},
        "ssim_window": window_for(*pairs.reference.shape[2:]),
        "far_outside_share": _outside(pairs), "lpips": None,
    }  # fmt: skip
    if judges.lpips:
        images["lpips"] = found["lpips"] = pretrained.lpips(pairs.reference, pairs.candidate)
    return images, found


def _outside(pairs: Pairs) -> float:
    """Share of the float model's values far outside of [-1, 1]."""
    return float((pairs.reference.abs() > _FAR).double().mean())


def notes(pairs: Pairs, distances: list[dict[str, Any]], spec: SamplerSpec, compiled: SamplerSpec) -> list[str]:
    """What a reader must know beside the figures.

    Args:
        spec, compiled: the sampler of the comparison, and the one that the file was compiled for.
    """
    notes = []
    if spec != compiled:
        notes.append(
            f"the file was compiled for {compiled.scheduler['_class_name']} with {compiled.steps} steps; other timesteps miss its "
            "tables, and its mean correction is interpolated"
        )
    window = window_for(*pairs.reference.shape[2:])
    if window < WINDOW:
        notes.append(
            f"SSIM with a window of {window}x{window}: the images are smaller than the usual {WINDOW}x{WINDOW}"
        )
    if (share := _outside(pairs)) > _FAR_SHARE:
        notes.append(
            f"{100 * share:.0f} % of the float model's values are beyond ±{_FAR}; all measures of images clamp to [-1, 1], which "
            "suits pixels and not latents"
        )
    if few := [row for row in distances if min(row["samples"]) <= row["dimension"]]:
        notes.append(
            f"{min(few[0]['samples'])} samples for {few[0]['dimension']} features ({few[0]['features']}): the Fréchet "
            "distance comes out too large with so few; KID has no such bias"
        )
    return notes
