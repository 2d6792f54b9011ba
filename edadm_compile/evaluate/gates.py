"""Limits on measured quality: what ``--fail-below`` and ``--fail-above`` ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edadm_compile.errors import InputError, did_you_mean

#: What can have a limit: name -> (unit, needs, what it is). "needs" names what must be there to measure it.
HIGHER_IS_BETTER = {
    "sqnr": ("dB", "", "noise-prediction SQNR over all steps"),
    "sqnr_without_last": ("dB", "", "the same without the last step"),
    "sqnr_worst_step": ("dB", "", "the lowest of the steps"),
    "psnr": ("dB", "", "PSNR of the images, mean"),
    "psnr_median": ("dB", "", "PSNR of the images, median"),
    "psnr_worst": ("dB", "", "PSNR of the worst image"),
    "ssim": ("", "", "SSIM of the images, mean"),
    "ssim_worst": ("", "", "SSIM of the worst image"),
    "inception_score": ("", "inception", "inception score of the quantized model's images"),
}
LOWER_IS_BETTER = {
    "frechet": ("", "features", "Fréchet distance, quantized to float"),
    "frechet_data": ("", "features and data", "Fréchet distance, quantized to data"),
    "kid": ("", "features", "KID, quantized to float"),
    "kid_data": ("", "features and data", "KID, quantized to data"),
    "lpips": ("", "lpips", "LPIPS of the images, mean"),
    "fid": ("", "inception", "FID (Inception features), quantized to float"),
    "fid_data": ("", "inception and data", "FID (Inception features), quantized to data"),
}


@dataclass(frozen=True)
class Gate:
    """One limit.

    Attributes:
        metric: a key of `HIGHER_IS_BETTER` (the limit is a floor) or `LOWER_IS_BETTER` (it is a ceiling).
        limit: the worst value that passes.
    """

    metric: str
    limit: float

    @property
    def below(self) -> bool:
        """Whether values below the limit fail."""
        return self.metric in HIGHER_IS_BETTER

    @property
    def needs(self) -> str:
        """What must be there to measure the metric; "" for nothing more."""
        return (HIGHER_IS_BETTER | LOWER_IS_BETTER)[self.metric][1]

    def passes(self, found: float) -> bool:
        """Whether a value is good enough; NaN never is."""
        return found >= self.limit if self.below else found <= self.limit


def parse(text: str | None, option: str) -> list[Gate]:
    """``sqnr=27,psnr=29`` as gates.

    Args:
        option: "--fail-below", for metrics where more is better, or "--fail-above".

    Raises:
        InputError: a malformed entry, an unknown metric, a metric of the other direction, or a name given twice.
    """
    gates: list[Gate] = []
    for part in [] if text is None else text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not name or not math.isfinite(limit):
            raise InputError(f"{option}: got {part.strip()!r}, expected NAME=NUMBER such as sqnr=27 or frechet=2")
        _check_name(name, option)
        if any(gate.metric == name for gate in gates):
            raise InputError(f"{option}: {name} is given twice")
        gates.append(Gate(name, limit))
    return gates


def _check_name(name: str, option: str) -> None:
    tables = {"--fail-below": HIGHER_IS_BETTER, "--fail-above": LOWER_IS_BETTER}
    other = next(o for o in tables if o != option)
    if name in tables[option]:
        return
    if name in tables[other]:
        better = "higher" if other == "--fail-below" else "lower"
        raise InputError(f"{option}: {name} is better when {better}; give its limit with {other}")
    known = [*tables[option], *tables[other]]
    hint = did_you_mean(name, known) or f"; allowed are {', '.join(tables[option])}"
    raise InputError(f"{option}: unknown metric {name!r}{hint}")


def judge(gates: list[Gate], metrics: Mapping[str, float]) -> list[dict[str, object]]:
    """One row per gate: metric, limit, direction, what was found, whether it passes."""
    return [
        {
            "metric": gate.metric, "fail": "below" if gate.below else "above", "limit": gate.limit,
            "found": metrics[gate.metric], "passed": gate.passes(metrics[gate.metric]),
        }
        for gate in gates
    ]  # fmt: skip


def failures(gates: list[Gate], metrics: Mapping[str, float]) -> list[str]:
    """A sentence for every limit that was missed: what was found and what was asked."""
    return [_sentence(gate, metrics[gate.metric]) for gate in gates if not gate.passes(metrics[gate.metric])]


def _sentence(gate: Gate, found: float) -> str:
    unit, _, what = (HIGHER_IS_BETTER | LOWER_IS_BETTER)[gate.metric]
    unit = f" {unit}" if unit else ""
    asked = "at least" if gate.below else "at most"
    return f"{gate.metric} ({what}) is {found:.6g}{unit}, asked for {asked} {gate.limit:g}{unit}"
