"""Compile a model file to a ``.qmod`` file."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edadm_compile
from edadm_compile.config import PRESETS, QuantConfig, from_dict, load_config
from edadm_compile.driver.device_code import DEFAULT_BATCHES, DeviceOptions, build, options_of
from edadm_compile.driver.options import guidance_options, load_options
from edadm_compile.errors import ArtifactError, ConfigError, InputError
from edadm_compile.evaluate.compare import NoiseComparison
from edadm_compile.evaluate.metrics import finite
from edadm_compile.frontend import Source, load_source
from edadm_compile.ir.program import Program, SamplerSpec
from edadm_compile.kernels.cubin import Bundle
from edadm_compile.kernels.request import triton_folder, triton_version
from edadm_compile.kernels.targets import parse_targets
from edadm_compile.methods import LOSSES
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.pipeline import CompileResult, compile_source
from edadm_compile.report.truth import describe, totals, truth_table
from edadm_compile.runtime.artifact import Artifact, write


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


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """Compile and write; returns the summary.

    Raises:
        EdadmError: bad input, or a failed compilation. An existing output file stays as it was.
    """
    config, device_code, source = prepare(request)
    result = compile_source(source, config, progress, dump=_dumper(request.dump))
    start = time.perf_counter()
    bundle = build(result.lowered, device_code, progress)
    result.seconds["kernels"] = time.perf_counter() - start
    size = write(to_artifact(result, bundle), request.output)
    return {**summary(result, source, request.output, size), "device": describe(bundle)}


def prepare(request: Request) -> tuple[QuantConfig, DeviceOptions, Source]:
    """Everything before the work: settings, GPU code to make, the loaded model.

    Raises:
        EdadmError: settings, files or an output that cannot be used.
    """
    if request.device != "cpu":
        raise InputError(f"--device: got {request.device!r}, this version calibrates and reconstructs on 'cpu' only")
    _check_writable(request.output)
    config = make_config(request.options, request.config_file)
    # A file for ONNX Runtime has no GPU form: code is made for it only where asked for, and then refused.
    targets = "none" if config.deploy and request.targets is None else request.targets
    device_code = options_of(targets, request.batch, request.store)
    _check_device_code(config, device_code)
    loading = load_options(request.options)
    eta = request.options.get("eta") or 0.0
    source = load_source(
        request.model, dataclasses.replace(loading, eta=eta, guidance=guidance_options(request.options))
    )
    return config, device_code, source


def compile_model(
    model: str | Path | nn.Module | Source,
    config: QuantConfig | None = None,
    *,
    output: str | Path | None = None,
    sampler: SamplerSpec | None = None,
    targets: str | None = "none",
    batches: Sequence[int] = DEFAULT_BATCHES,
    progress: Progress | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a file, a folder, a module or a loaded source.

    Args:
        config: settings, default W4A8.
        output: ``.qmod`` file to write.
        sampler: needed for a bare module.
        targets: architectures to put GPU code for into `output`, as ``--targets``; None for the default ones.
        batches: batch sizes of that code.
        progress: receives stages and steps.
        options: for a path, fields of `edadm_compile.frontend.LoadOptions`; for a module, keywords of
            `edadm_compile.frontend.source_from_module` (shape, conditions, num_classes, fixed, guidance).

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
    result = compile_source(source, config, progress)
    if output is not None:
        write(to_artifact(result, build(result.lowered, device_code, progress or Silent())), Path(output))
    return result


def make_config(options: dict[str, Any], config_file: Path | None) -> QuantConfig:
    """Settings from a file with command-line options on top.

    Raises:
        ConfigError: contradicting or invalid settings.
    """
    values = load_config(config_file) if config_file is not None else {}
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
        "units": result.stats.get("reconstruct", {}).get("units", []),
        "average_bits": result.stats["assign_widths"]["average_bits"],
        **({"mixed_precision": mixed} if (mixed := result.stats["assign_widths"].get("mixed")) else {}),
        "versions": {
            "edadm_compile": edadm_compile.__version__,
            "torch": torch.__version__,
            **({"triton": triton_version()} if device is not None else {}),
        },
    }
    return Artifact(result.qdq, result.lowered, manifest, device)


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
        "notes": list(result.lowered.notes),
    }


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


def _check_writable(output: Path) -> None:
    """Fail before hours of work, not after."""
    folder = output.parent
    if not folder.is_dir():
        raise ArtifactError(f"cannot write {output}: folder {folder} does not exist")
    if output.is_dir() or not os.access(folder, os.W_OK):
        raise ArtifactError(f"cannot write {output}: {'it is a folder' if output.is_dir() else 'permission denied'}")


def _dumper(folder: Path | None) -> Any:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    counter = iter(range(100))

    def dump(name: str, program: Program) -> None:
        (folder / f"{next(counter):02d}_{name}.txt").write_text(
            f"# dialect {program.dialect}\n{program.graph_module.graph}\n"
        )

    return dump
