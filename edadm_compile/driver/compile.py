"""Compile a model file to a ``.qmod`` file."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edadm_compile
from edadm_compile.calibration.given import CalibrationSamples
from edadm_compile.callbacks import Dispatcher, Receiver
from edadm_compile.config import PRESETS, QuantConfig, from_dict, load_config
from edadm_compile.driver import report as reports
from edadm_compile.driver import shapes
from edadm_compile.driver.device_code import DEFAULT_BATCHES, DeviceOptions, build, fitted, options_of
from edadm_compile.driver.fingerprint import inputs_of
from edadm_compile.driver.options import guidance_options, load_options, shapes_of
from edadm_compile.driver.outputs import check_writable
from edadm_compile.driver.session import LOG, WorkOptions, default_folder, memory_limit, session
from edadm_compile.errors import ArtifactError, ConfigError, InputError, ParallelError
from edadm_compile.evaluate.compare import NoiseComparison
from edadm_compile.evaluate.metrics import finite
from edadm_compile.frontend import Source, load_source
from edadm_compile.ir.program import Program, SamplerSpec
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.kernels.request import triton_folder, triton_version
from edadm_compile.kernels.targets import parse_targets
from edadm_compile.methods import LOSSES
from edadm_compile.parallel.world import World
from edadm_compile.passes.base import Progress
from edadm_compile.pipeline import CompileResult, compile_source
from edadm_compile.report.truth import describe, totals, truth_table
from edadm_compile.report.versions import versions
from edadm_compile.runtime.artifact import Artifact, write
from edadm_compile.runtime.atomic import sweep
from edadm_compile.runtime.shapes import Programs


@dataclasses.dataclass(frozen=True)
class Request:
    """One compilation as the command line asks for it.

    Attributes:
        model: file or folder to compile.
        output: file to write.
        device: where calibration and reconstruction run.
        config_file: TOML or JSON settings.
        dump: folder for the graph after each pass.
        options: command-line options by name, None where not given.
        targets, batch, store: options of the GPU code to make, None where not given.
        report: HTML page to write, or None.
        workdir: folder for checkpoints, kept after success; None for one beside the output, removed after success.
        restart: discard the checkpoints of an earlier run.
        threads: threads that compute; None for torch's default. The last bits of a result depend on it.
        say: receives sentences for the user besides progress: what is resumed, what was damaged.
    """

    model: Path
    output: Path
    device: str
    config_file: Path | None
    dump: Path | None
    options: dict[str, Any]
    targets: str | None = None
    batch: str | None = None
    store: str | None = None
    report: Path | None = None
    workdir: Path | None = None
    restart: bool = False
    threads: int | None = None
    say: Callable[[str], None] = LOG


def run(request: Request, progress: Progress, world: World | None = None) -> dict[str, Any]:
    """Compile and write; returns the summary.

    Args:
        world: the processes that compile together; the first one writes, the others return an empty summary.

    Raises:
        EdadmError: bad input, or a failed compilation. An existing output file stays as it was.
        Stopped: SIGINT or SIGTERM; finished stages are kept in the working folder.
    """
    world = world or World()
    config, device_code, source = prepare(request, world)
    options = WorkOptions(
        working_folder(request, world),
        keep=request.workdir is not None,
        restart=request.restart,
        memory=memory_limit(request.options.get("memory"), request.config_file),
        threads=request.threads,
        say=request.say,
    )
    dump = _dumper(request.dump) if world.leads else None
    with session(options, inputs_of(source, config)) as work:
        if world.leads:
            sweep(request.output.parent, request.output.name)
        result = compile_source(
            source, config, progress, dump=dump, checkpoints=work.checkpoints, caches=work.caches, world=world
        )
        if not world.leads:
            return {}
        start = time.perf_counter()
        if device_code.targets:
            device_code = fitted(device_code, request.store, _beyond(result))
        bundle = build(result.lowered, device_code, progress)
        result.seconds["kernels"] = time.perf_counter() - start
        size = write(to_artifact(result, bundle), request.output)
        found = {
            **summary(result, source, request.output, size),
            "device": describe(bundle),
            **work.report(result.restored),
        }
    if request.report is not None:
        found["report"] = reports.after_compile(request.output, source, result.seconds, request.report, progress)
    return found


def prepare(request: Request, world: World) -> tuple[QuantConfig, DeviceOptions, Source]:
    """Everything before the work: settings, GPU code to make, the loaded model.

    Raises:
        EdadmError: settings, files or an output that cannot be used.
    """
    if request.device != "cpu":
        raise InputError(f"--device: got {request.device!r}, this version calibrates and reconstructs on 'cpu' only")
    if world.leads:  # the others may be on machines where the folder does not exist
        check_writable(request.output)
        if request.report is not None:
            reports.check(request.report)
    config = make_config(request.options, request.config_file)
    # A file for ONNX Runtime has no GPU form: code is made for it only where asked for, and then refused.
    targets = "none" if config.deploy and request.targets is None else request.targets
    targets = shapes.targets_for(request.options, targets, request.say if world.leads else lambda sentence: None)
    device_code = options_of(targets, request.batch, request.store)
    _check_device_code(config, device_code)
    shapes.check_targets(len(shapes_of(request.options)), device_code.targets)
    loading = load_options(request.options)
    eta = request.options.get("eta") or 0.0
    source = load_source(
        request.model, dataclasses.replace(loading, eta=eta, guidance=guidance_options(request.options))
    )
    return config, device_code, source


def working_folder(request: Request, world: World) -> Path | None:
    """Where finished stages are kept; nowhere while several processes work together.

    Raises:
        ParallelError: a folder or a limit was asked for all the same.
    """
    if world.size == 1:
        return request.workdir or default_folder(request.output)
    asked = {"--workdir": request.workdir, "--restart": request.restart, "--memory": request.options.get("memory")}
    for option, value in asked.items():
        if value:
            raise ParallelError(
                f"{option}: {world.size} processes that compile together keep no working folder; run one process, or "
                f"leave {option} out"
            )
    return None


def compile_model(
    model: str | Path | nn.Module | Source,
    config: QuantConfig | None = None,
    *,
    output: str | Path | None = None,
    sampler: SamplerSpec | None = None,
    targets: str | None = "none",
    batches: Sequence[int] = DEFAULT_BATCHES,
    calibration: CalibrationSamples | None = None,
    callbacks: Receiver | Sequence[Receiver] | None = None,
    report: str | Path | None = None,
    workdir: str | Path | None = None,
    restart: bool = False,
    memory: int | str | None = None,
    threads: int | None = None,
    world: World | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a file, a folder, a module or a loaded source.

    Args:
        config: settings, default W4A8.
        output: ``.qmod`` file to write.
        sampler: needed for a bare module.
        targets: architectures to put GPU code for into `output`, as ``--targets``; None for the default ones.
        batches: batch sizes of that code.
        calibration: samples of your own, in place of those that are collected along the sampler's trajectories
            (``calib_samples`` and ``selection`` then decide nothing).
        callbacks: functions of an event, or objects with the methods of `edadm_compile.Callbacks`. What one raises
            ends the compilation, and nothing is written.
        report: HTML page to write about `output` (see docs/report.md).
        workdir: folder for checkpoints: the same call with it starts from where the last one stopped. It is kept;
            without one nothing is. What is resumed or damaged is told to the logger "edadm_compile".
        restart: discard the checkpoints of an earlier call.
        memory: most bytes of caches in memory, as a number or as "4GB"; what exceeds it is spilled to `workdir`.
        threads: threads that compute; the last bits of a result depend on it. None for torch's setting.
        world: the processes that compile together, from `edadm_compile.parallel.launch.processes`; the first one writes,
            and none keeps a `workdir`.
        options: for a path, fields of `edadm_compile.frontend.LoadOptions`; for a module, keywords of
            `edadm_compile.frontend.source_from_module` (shape, conditions, num_classes, fixed, guidance). With
            other_shapes, either way, the file is for these shapes of x too.

    Raises:
        EdadmError: see `edadm_compile.errors`.
    """
    from edadm_compile.frontend import LoadOptions, source_from_module

    if isinstance(model, nn.Module):
        if sampler is None:
            raise InputError("compile_model: a bare module needs sampler=SamplerSpec(scheduler={...}, steps=...)")
        source = source_from_module(model, sampler, **options)
    elif isinstance(model, Source):
        source = model
    else:
        source = load_source(Path(model), LoadOptions(**options))
    config = config or QuantConfig()
    device_code = DeviceOptions(parse_targets(targets), tuple(batches)) if output is not None else DeviceOptions(())
    _check_device_code(config, device_code)
    shapes.check_targets(len(shapes.all_shapes(source)), device_code.targets)
    if report is not None:
        if output is None:
            raise InputError("compile_model: report is about a file; give output= as well")
        reports.check(Path(report))
    if workdir is not None and world is not None and world.size > 1:
        raise ParallelError(
            f"compile_model: {world.size} processes that compile together keep no workdir; leave it out"
        )
    told = Dispatcher(callbacks)
    folder = None if workdir is None else Path(workdir)
    work = WorkOptions(folder, keep=True, restart=restart, memory=memory_limit(memory), threads=threads)
    with session(work, inputs_of(source, config, calibration)) as found:
        result = compile_source(
            source, config, told, calibration=calibration, block_finished=told.block, world=world,
            checkpoints=found.checkpoints, caches=found.caches,
        )  # fmt: skip
        if output is not None and (world is None or world.leads):
            device_code = fitted(device_code, None, _beyond(result))
            write(to_artifact(result, build(result.lowered, device_code, told)), Path(output))
    if output is not None and report is not None and (world is None or world.leads):
        reports.after_compile(Path(output), source, result.seconds, Path(report), told)
    return result


def make_config(options: dict[str, Any], config_file: Path | None) -> QuantConfig:
    """Settings from a file with command-line options on top.

    Raises:
        ConfigError: contradicting or invalid settings.
    """
    values = load_config(config_file) if config_file is not None else {}
    values.pop("memory", None)  # decides no result: see `edadm_compile.driver.session`
    preset = options.get("preset")
    if preset is not None:
        values["weight_bits"], values["act_bits"] = PRESETS[preset]
    names = {"weights_bits": "weight_bits", "acts_bits": "act_bits", "method": "method", "uniform": "uniform",
             "attention": "attention", "deploy": "deploy", "seed": "seed", "calib_samples": "calib_samples",
             "selection": "selection", "split": "split", "budget_bits": "budget_bits", "min_sqnr": "min_sqnr"}  # fmt: skip
    for option, name in names.items():
        value = options.get(option)
        if value is not None:
            if preset is not None and name in ("weight_bits", "act_bits") and values[name] != value:
                raise ConfigError(
                    f"--{preset} and --{option.replace('_', '-')} {value} contradict each other; give one of them"
                )
            values[name] = value
    trained = {name: options[name] for name in ("iters", "qdrop") if options.get(name) is not None}
    if options.get("loss") is not None:
        trained |= dict(zip(("block_loss_weight", "layer_loss_weight"), LOSSES[options["loss"]], strict=True))
    listed = values.get("reconstruction", {})
    if trained and isinstance(listed, dict):
        values["reconstruction"] = {**listed, **trained}
    return from_dict(values, str(config_file) if config_file else "command line")


def to_artifact(result: CompileResult, device: Bundle | None = None) -> Artifact:
    """What goes into the file: programs, settings, provenance and quality; no times, so that bytes are reproducible."""
    quality = None if result.quality is None else _quality(result.quality)
    manifest = {
        "config": result.config.to_dict(),
        "source": result.source,
        "quality": quality,
        "allocation": result.allocation,
        "selection": result.selection,
        "sensitivity": _sensitivity(result.stats["assign_widths"].get("sensitivity")),
        "units": result.stats.get("reconstruct", {}).get("units", []),
        "average_bits": result.stats["assign_widths"]["average_bits"],
        **({"beyond_float16": beyond} if (beyond := _beyond(result)) is not None else {}),
        **({"warnings": result.warnings} if result.warnings else {}),
        "computed_with": result.computed_with,
        **({"mixed_precision": mixed} if (mixed := result.stats["assign_widths"].get("mixed")) else {}),
        "versions": {
            "edadm_compile": edadm_compile.__version__,
            "torch": torch.__version__,
            **({"triton": triton_version()} if device is not None else {}),
        },
    }
    return Artifact(
        result.qdq, result.lowered, manifest, device, tuple(Programs(*programs) for programs in result.others)
    )


def _sensitivity(found: dict[str, float | None] | None) -> dict[str, float] | None:
    """Measured noise-to-signal ratios by layer, with six digits; None where none were measured."""
    known = {name: float(f"{ratio:.6g}") for name, ratio in (found or {}).items() if ratio is not None}
    return known or None


def summary(result: CompileResult, source: Source, output: Path, size: int) -> dict[str, Any]:
    """What the command prints at the end, as plain values."""
    rows = truth_table(result.lowered, result.config.name)
    widths: dict[str, int] = {}
    for row in rows:
        widths[row["executed"]] = widths.get(row["executed"], 0) + 1
    units = result.stats.get("reconstruct", {}).get("units", [])
    return {
        "output": str(output),
        "model": source.provenance(),
        "shapes": shapes.all_shapes(source),
        "config": result.config.name,
        "method": result.config.method,
        "layers": dict(sorted(widths.items())),
        "average_weight_bits": round(result.stats["assign_widths"]["average_bits"], 3),
        "promoted": result.stats["assign_widths"].get("promoted", []),
        "mixed_precision": result.stats["assign_widths"].get("mixed"),
        "blocks": len(units),
        "bytes": {"fp32_parameters": 2 * result.float_bytes, "fp16_parameters": result.float_bytes, "file": size},
        "weights": totals(rows),
        "sqnr_db": None if result.quality is None else _quality(result.quality),
        "seconds": {k: round(v, 1) for k, v in result.seconds.items()},
        "total_seconds": round(sum(result.seconds.values()), 1),
        "float_layers": {row["layer"]: row["note"] for row in rows if row["executed"] == "float"},
        "notes": [*result.lowered.notes, *result.warnings],
        "reconstruction": units,
        "versions": versions(),
    }


def _beyond(result: CompileResult) -> dict[str, Any] | None:
    """The layer whose values float16 cannot hold, if there is one."""
    found: dict[str, Any] | None = result.stats["calibrate"].get("beyond_float16")
    return found


def _quality(quality: NoiseComparison) -> dict[str, Any]:
    """Figures as plain values; those of the branches only under guidance."""
    values = finite(dataclasses.asdict(quality))
    return {k: v for k, v in values.items() if k != "branches" or quality.branches is not None}


def _check_device_code(config: QuantConfig, options: DeviceOptions) -> None:
    """Refuse GPU code that cannot be made before hours of work, not after."""
    if not options.targets:
        return
    if config.deploy is not None:
        raise ConfigError(
            f"deploy = {config.deploy!r} and targets {', '.join(options.targets)} exclude each other: convolution "
            "outputs rounded to 8 bits have no GPU kernel; compile twice, or with targets 'none'"
        )
    triton_folder()


def _dumper(folder: Path | None) -> Any:
    if folder is None:
        return None
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"--dump-graphs {folder}: it is a file, expected a folder (which is made where it does not exist)"
        )
    counter = iter(range(100))

    def dump(name: str, program: Program) -> None:
        text = f"# dialect {program.dialect}\n{program.graph_module.graph}\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{next(counter):02d}_{name}.txt").write_text(text)
        except OSError as error:
            raise ArtifactError(f"--dump-graphs: cannot write to {folder}: {error.strerror or error}") from None

    return dump
