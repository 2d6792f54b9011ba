"""The same layers in half precision by torch's libraries (cuDNN, cuBLAS), for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edadm_compile.driver.single_launch import Runner, isolate
from edadm_compile.driver.tune_search import Found, Measure, Shape, key_of
from edadm_compile.errors import TargetError
from edadm_compile.kernels.launch import Launch, LaunchPlan, Operand
from edadm_compile.kernels.registry import kernel
from edadm_compile.kernels.tiles import family
from edadm_compile.passes.base import Progress

_ROUNDS = 3


def faster(
    plans: Sequence[LaunchPlan], shapes: Sequence[Shape], found: Found, measure: Measure, runner: Runner,
    progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """Shapes that the library computes faster in fp16 than the best integer tile with the quantizer that feeds it.

    Args:
        plans: whole plans, in which the quantizers are looked up.
        shapes: as searched.
        found: times of the integer launches.
        measure: times a quantizer alone.
        runner: of the device.
    """
    rows = []
    for shape in shapes:
        progress.advance(1, shape.layer)
        if shape.key not in found.best:
            continue
        plan = next(p for p in plans if any(_is(launch, shape) for launch in p.launches))
        launch = next(launch for launch in plan.launches if _is(launch, shape))
        try:
            before = _quantizer_time(plan, launch, measure, runner)
            half = runner.time({"": library_call(launch, plan.batch, runner.device)}, _ROUNDS)[""].median
        except (TargetError, RuntimeError):  # nothing to report for a layer the library does not take
            continue
        best = found.times[shape.key][found.best[shape.key]]
        if half < best + before:
            rows.append(
                {
                    "layer": shape.layer,
                    "key": shape.key,
                    "fp16_us": half,
                    "integer_us": best + before,
                    "quantizer_us": before,
                }
            )
    return rows


def _is(launch: Launch, shape: Shape) -> bool:
    return (
        launch.layer == shape.layer and family(launch.kernel) == shape.key.split(" ")[0] and key_of(launch) == shape.key
    )


def _quantizer_time(plan: LaunchPlan, launch: Launch, measure: Measure, runner: Runner) -> float:
    """Microseconds of the launch that only quantizes the input; 0 where a norm or an epilogue does that on the way."""
    x = launch.operands["x"]
    for other in plan.launches:
        if other.kernel == "quantize" and any(_same(other.operands.get(role), x) for role in other.writes):
            alone = isolate(plan, other)
            runner.prepare([alone])
            return measure(alone)
    return 0.0


def _same(a: Operand | None, b: Operand) -> bool:
    return a is not None and (a.space, a.key) == (b.space, b.key)


def library_call(launch: Launch, batch: int, device: torch.device) -> Callable[[], object]:
    """The product of a matrix launch in torch, float16 on random data, channels last; bias in, the rest left out.

    An upsampled convolution reads an input that is already large, which favours the library.
    """
    v = kernel(launch.kernel).values(launch)
    two = v["SEGMENTS"] == 2 and launch.operands["w2"].key != launch.operands["w"].key  # else one input in two halves
    depth, outputs = v["C"] + (v["C2"] if two else 0), v["O"] * (2 if v["GLU"] else 1)
    options: dict[str, Any] = {"dtype": torch.float16, "device": device}
    bias = torch.randn(outputs, **options)
    if family(launch.kernel) == "qlinear":
        x, w = torch.randn(v["rows"], depth, **options), torch.randn(outputs, depth, **options)
        return lambda: torch.nn.functional.linear(x, w, bias)
    size = (v["H"] * v["UPSAMPLE"], v["W"] * v["UPSAMPLE"])
    images = v["pixels"] // (v["OH"] * v["OW"])
    last = torch.channels_last
    image = torch.randn(images, depth, *size, **options).contiguous(memory_format=last)
    weight = torch.randn(outputs, depth, v["KH"], v["KW"], **options).contiguous(memory_format=last)
    stride, dilation = (v["STRIDE_H"], v["STRIDE_W"]), (v["DIL_H"], v["DIL_W"])
    padding = (v["PAD_T"], v["PAD_L"])
    return lambda: torch.nn.functional.conv2d(image, weight, bias, stride, padding, dilation)
