"""What a compilation will take and give, told before it is done."""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from edadm_compile.calibration.sampler import timesteps
from edadm_compile.config import QuantConfig
from edadm_compile.driver.compile import Request, prepare, to_artifact, working_folder
from edadm_compile.driver.device_code import DeviceOptions, make_plans
from edadm_compile.driver.fingerprint import inputs_of
from edadm_compile.driver.memory_estimate import Sampled, memory_estimate
from edadm_compile.driver.outline import Outline, make_outline
from edadm_compile.driver.session import computing_with, memory_limit
from edadm_compile.driver.shapes import all_shapes
from edadm_compile.driver.time_estimate import measure_machine, time_estimate, without_done
from edadm_compile.driver.workdir import earlier_stages
from edadm_compile.evaluate.compare import NoiseComparison
from edadm_compile.frontend import Source
from edadm_compile.ir.program import constants_of, layers
from edadm_compile.kernels import aot, plan_json
from edadm_compile.kernels.aot_cache import Cache, default_cache
from edadm_compile.kernels.aot_process import available_cores
from edadm_compile.parallel.world import World
from edadm_compile.passes.base import Progress
from edadm_compile.passes.checkpoint import machine
from edadm_compile.pipeline import CompileResult, quality_trajectories
from edadm_compile.report.truth import totals, truth_table
from edadm_compile.runtime.artifact import expected_size

#: Deflated bytes of a kernel, and seconds a core needs to compile one, where it is not in the cache: averages over the
#: UNets of benchmarks/results/cpu-2core/census_cifar10.json.
_KERNEL_BYTES, _KERNEL_SECONDS = 5_500, 1.7
#: A loss before and after, as long as JSON writes most of them.
_LOSS = 0.0123456789012345


def run(request: Request, progress: Progress, world: World | None = None) -> dict[str, Any]:
    """Load, capture, and tell the rest.

    Raises:
        EdadmError: what the compilation would refuse before its work.
    """
    world = world or World()
    config, device_code, source = prepare(request, world)
    folder = working_folder(request, world)
    memory = memory_limit(request.options.get("memory"), request.config_file)
    done = []
    if folder is not None and not request.restart:
        done = earlier_stages(folder, inputs_of(source, config), request.say)
    progress.stage("capture", None)
    with computing_with(request.threads):
        found = estimate(source, config, device_code, memory=memory, done=done, world=world)
    return {
        "model": source.provenance(),
        **found,
        "workdir": None if folder is None else str(folder),
        "output": str(request.output),
    }


def estimate(
    source: Source,
    config: QuantConfig,
    device_code: DeviceOptions,
    *,
    memory: int | None = None,
    done: Sequence[str] = (),
    world: World | None = None,
) -> dict[str, Any]:
    """The estimate for a loaded source, as plain values.

    Args:
        memory: most bytes of caches in memory; the rest is on disk.
        done: stages and blocks that an earlier run left (`edadm_compile.driver.workdir.earlier_stages`).
        world: processes that would compile together; one alone is what is estimated.

    Returns:
        layers by width and by kind (those of tables count as integer), blocks, seconds by stage, peak memory by stage, sizes
        in bytes, and float layers with reasons.

    Raises:
        EdadmError: what the compilation would refuse after capture.
    """
    start = time.perf_counter()
    outline = make_outline(source, config, world=world)
    seconds = time.perf_counter() - start
    sampled = sampled_rows(source, outline, config)
    code = _device_code(outline, device_code)
    file = expected_size(to_artifact(_result(source, outline, config, sampled))) + code["bytes"]
    rows = truth_table(outline.lowered, config.name)
    peaks = memory_estimate(outline, config, sampled, 4 * source.parameters(), _added(outline), file, memory)
    stages = time_estimate(outline, config, sampled, measure_machine(), seconds) | {"kernels": code["seconds"]}
    stages = without_done(stages, done, len(outline.units) * len(config.recipe.phases))
    widths = Counter(row["executed"] for row in rows)
    kinds = {
        k: Counter(r["kind"] for r in rows if (r["executed"] == "float") == (k == "float"))
        for k in ("integer", "float")
    }
    return {
        "config": config.name,
        "method": config.method,
        "parameters": source.parameters(),
        "shapes": all_shapes(source),
        "nodes": outline.captured,
        "layers": dict(sorted(widths.items())),
        "kinds": {name: dict(sorted(found.items())) for name, found in kinds.items()},
        "widths": "measured" if outline.measured else "known",
        "average_weight_bits": round(outline.average_bits, 3),
        "blocks": len(outline.units),
        "samples": {"steps": sampled.steps, "scored": sampled.scored, "collected": sampled.collected},
        "seconds": {k: round(v, 3) for k, v in stages.items()},
        "total_seconds": round(sum(stages.values()), 3),
        "memory": peaks,
        "resumed": list(done),
        "bytes": {"fp16_parameters": source.parameter_bytes(), "file": file, "gpu_code": code["bytes"]},
        "weights": totals(rows),
        "gpu_code": code,
        "float_layers": {row["layer"]: row["note"] for row in rows if row["executed"] == "float"},
    }


def sampled_rows(source: Source, outline: Outline, config: QuantConfig) -> Sampled:
    """Rows of the model that calibration and the closing measurement run."""
    sampler = outline.floats.sampler
    return Sampled(
        len(timesteps(sampler)),
        config.tdac.trajectories * sampler.branches,
        config.calib_samples * sampler.branches,
        quality_trajectories(source, config) * sampler.branches,
    )


def _added(outline: Outline) -> int:
    """Bytes of constants that the passes made beside those of the source."""
    return _bytes({n: v for n, v in constants_of(outline.floats).items() if n not in outline.original})


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(v.numel() * v.element_size() for v in tensors.values())


def _result(source: Source, outline: Outline, config: QuantConfig, sampled: Sampled) -> CompileResult:
    """The outline in the place of a result, with stand-ins for what only work finds out."""
    phases = config.recipe.phases if config.reconstruction.iters else ()
    units = [
        {"unit": u.name, "kind": u.kind, "layers": len(u.layers), "phase": phase, "before": _LOSS, "after": _LOSS}
        for phase in phases
        for u in outline.units
    ]
    quality = NoiseComparison(_LOSS, _LOSS, (_LOSS,) * sampled.steps)
    stats: dict[str, dict[str, Any]] = {
        "reconstruct": {"units": units},
        "assign_widths": {"average_bits": outline.average_bits, "sensitivity": _sensitivities(outline)},
        "calibrate": {},
    }
    counts = [config.calib_samples // sampled.steps] * sampled.steps
    scores = [_LOSS] * sampled.steps
    selection = {"timesteps": scores, "density": scores, "diversity": scores, "radius": _LOSS}
    return CompileResult(
        outline.qdq, outline.lowered, config, stats, {}, quality, counts, source.parameter_bytes(), source.provenance(),
        selection, computed_with=machine(), others=outline.others,
    )  # fmt: skip


def _sensitivities(outline: Outline) -> dict[str, float | None]:
    """A measured ratio, as long as six digits are, for every layer where widths are measured."""
    if not outline.measured:
        return {}
    return {info.name: 0.000123456 for info in layers(outline.lowered) if info.executed != "float"}


def _device_code(outline: Outline, options: DeviceOptions) -> dict[str, Any]:
    """Plans as they will be, and kernels from the cache or by averages."""
    if not options.targets:
        return {"targets": [], "plans": [], "kernels": 0, "missing": 0, "bytes": 0, "core_seconds": 0.0, "seconds": 0.0}
    plans = make_plans(outline.lowered, options)
    store = Cache(default_cache())
    found = {key: store.get(key) for key in aot.distinct(plans)}
    missing = sum(cubin is None for cubin in found.values())
    size = sum(len(zlib.compress(plan_json.to_json(plan).encode(), 9)) for plan in plans)
    size += sum(_KERNEL_BYTES if c is None else len(zlib.compress(c.data, 9)) for c in found.values())
    launches = [
        {"arch": p.arch, "batch": p.batch, "launches": len(p.launches) - p.conditioning, "once": p.conditioning}
        for p in plans
    ]
    return {
        "targets": list(options.targets), "plans": launches, "kernels": len(found), "missing": missing, "bytes": size,
        "core_seconds": len(found) * _KERNEL_SECONDS, "seconds": missing * _KERNEL_SECONDS / available_cores(),
    }  # fmt: skip
