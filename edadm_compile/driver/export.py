"""Export a compiled file to ONNX, check it in ONNX Runtime, and write it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_compile.calibration import guidance, sampler
from edadm_compile.callbacks import Dispatcher, Receiver
from edadm_compile.driver import shapes
from edadm_compile.driver.options import condition_options, load_options
from edadm_compile.errors import ContractError, ExportError, InputError
from edadm_compile.evaluate.compare import compare_noise
from edadm_compile.frontend import Source, load_source
from edadm_compile.ir.program import Program, Signature
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.runtime.artifact import Artifact, read, read_manifest, write_atomically
from edadm_compile.runtime.engines.onnxruntime import OnnxRuntimeEngine, missing_packages
from edadm_compile.runtime.engines.reference import ReferenceEngine
from edadm_compile.runtime.sampler_json import sampler_to_json

LAYOUTS = ("file", "diffusers")
#: Sampler states on which layers and output are compared, and images of each.
_STATES, _IMAGES = 5, 2
#: Float trajectories for the comparison with the float model.
_TRAJECTORIES = 4


def run(
    artifact: Path,
    output: Path,
    *,
    onnx_target: str = "cpu",
    int4: bool = False,
    layout: str = "file",
    reference: Path | None = None,
    check: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export a ``.qmod`` file.

    Args:
        output: ONNX file to write; with the diffusers layout a folder, which gets ``unet/model.onnx`` and
            ``unet/config.json``.
        onnx_target: "cpu", "arm" or "tensorrt".
        int4: store weights of up to 4 bits as INT4.
        reference: the float model; its predictions are compared too.
        check: run the graph in ONNX Runtime before it is written.
        options: how to load `reference`.

    Returns:
        files, sizes, which layers run in integers and which do not and why, errors against the reference engine.

    Raises:
        ExportError: the request or the program has no ONNX form, or the output cannot be written; a file that was there
            is untouched.
        ContractError: the graph does not compute what the reference engine computes; nothing is written.
    """
    _need_packages(check)
    from edadm_compile.export import files
    from edadm_compile.export.convert import convert, describe
    from edadm_compile.export.stored import stored_weights
    from edadm_compile.export.targets import target

    progress = progress or Silent()
    if int4 and onnx_target == "tensorrt":
        raise ExportError(
            "--int4: TensorRT takes INT4 constants in blocks of weight-only products alone; export INT8 for it"
        )
    path = _place(output, layout)
    whole = read(artifact)
    loaded, options = shapes.choose(whole, options)
    config = _diffusers_config(loaded) if layout == "diffusers" else None
    progress.stage("graph", None)
    exported = convert(loaded.qdq, target(onnx_target), int4=int4, scalar_time=layout == "diffusers")
    settings = loaded.manifest["config"]
    trained = settings.get("deploy") == "onnxruntime"
    scales = "in the reconstruction" if trained else "calibrated afterwards"
    facts = {
        "target": onnx_target, "output_scales": scales if exported.target.output_codes else "none, outputs are float",
        "sampler": sampler_to_json(loaded.lowered.sampler, loaded.lowered.signature), "source": loaded.manifest.get("source", {}).get("sha256", ""),
    }  # fmt: skip
    describe(exported.model, **facts)
    result: dict[str, Any] = {
        "output": str(path), **shapes.told(whole, loaded), "target": onnx_target, "what": exported.target.what, "int4": int4,
        "output_scales": facts["output_scales"], "weights": stored_weights(exported), "notes": _notes(exported.prepared, onnx_target), "check": None,
    }  # fmt: skip
    if check:
        progress.stage("ONNX Runtime", None)
        result["check"] = _check(loaded, exported, reference, options, one_time=layout == "diffusers")
        if result["check"]["broken"]:
            raise ContractError(_sentence(result["check"]["broken"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = files.save(exported.model, path)
    if config is not None:
        write_atomically(path.with_name("config.json"), json.dumps(config, indent=2, sort_keys=True).encode())
        written.append(path.with_name("config.json"))
    result["files"] = {str(p): p.stat().st_size for p in written}
    result["bytes"] = sum(result["files"].values())
    return result


def default_output(artifact: Path, name: Path, options: dict[str, Any]) -> Path:
    """Where an export goes without ``-o``: `name`, with the size in it where the file has several shapes.

    Raises:
        EdadmError: an unreadable file, or a ``--shape`` that was not compiled.
    """
    if "shapes" not in read_manifest(artifact):  # nearly every file: the export itself reads the rest
        return name
    loaded = read(artifact)
    return shapes.sized(name, loaded, shapes.choose(loaded, options)[0])


def export_onnx(
    artifact: str | Path,
    output: str | Path,
    *,
    callbacks: Receiver | Sequence[Receiver] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Export a ``.qmod`` file to ONNX; arguments, result and errors as of `run`.

    Args:
        callbacks: as of `edadm_compile.compile_model`.
    """
    return run(Path(artifact), Path(output), progress=Dispatcher(callbacks), **options)


def _need_packages(check: bool) -> None:
    missing = missing_packages(runtime=check)
    if missing:
        hint = " (or export with --no-check)" if missing == "onnxruntime" else ""
        raise ExportError(f"export needs {missing}, not installed; run: pip install 'edadm-compile[onnx]'{hint}")


def _place(output: Path, layout: str) -> Path:
    """Where the graph goes; refuses what cannot be written before any work."""
    from edadm_compile.export.files import check_writable

    if layout not in LAYOUTS:
        raise ExportError(f"--layout: got {layout!r}, allowed {', '.join(LAYOUTS)}")
    if layout == "file":
        check_writable(output)
        return output
    for folder in (output, output / "unet"):
        if folder.exists() and not folder.is_dir():
            raise ExportError(f"cannot write {folder}: the diffusers layout needs a folder, this is a file")
        check_writable(folder / "model.onnx" if folder.exists() else folder)
        if not folder.exists():
            break  # made when there is something to put into it
    return output / "unet" / "model.onnx"


def _diffusers_config(loaded: Artifact) -> dict[str, Any]:
    config = dict(loaded.manifest.get("source", {}).get("config", {}))
    if not config:
        raise ExportError(
            "--layout diffusers: the file was not compiled from a diffusers model, it has no configuration"
        )
    return {"time_cond_proj_dim": None, "_class_name": loaded.lowered.signature.source, **config}


def _notes(prepared: Program, onnx_target: str) -> list[str]:
    """What a user must know beside the figures."""
    notes = []
    if onnx_target == "tensorrt":
        notes.append("activations were made symmetric, which costs accuracy where a range is one-sided (after SiLU)")
    if prepared.signature.min_batch == prepared.signature.max_batch:
        notes.append(f"the model was captured for batches of {prepared.signature.min_batch} only")
    return notes


def _check(
    loaded: Artifact, exported: Any, reference: Path | None, options: dict[str, Any], *, one_time: bool
) -> dict[str, Any]:
    from edadm_compile.driver.export_check import Check

    engine = OnnxRuntimeEngine(exported)
    source: Source | None = None
    if reference is not None:
        source = load_source(reference, load_options(options, loaded.lowered.sampler))
        if [s.shape for s in source.signature.inputs] != [s.shape for s in loaded.lowered.signature.inputs]:
            raise InputError("--reference takes other inputs than the model that was compiled")
    pool = _conditions(loaded.lowered.signature, source, options)
    inputs = states(loaded.lowered, engine, pool, one_time=one_time)
    result = Check(exported, loaded.lowered, inputs).run()
    if source is not None:
        result["end_to_end"] |= _quality(loaded.lowered, engine, source)
    return result


def _conditions(signature: Signature, source: Source | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """Values [N, ...] of conditions by name: the user's, else standard normal ones, which exercise a graph as well."""
    given = source.conditions if source is not None else condition_options(options, None, signature).conditions
    generator = torch.Generator().manual_seed(0)
    drawn = {
        spec.name: torch.randn((_IMAGES, *spec.shape), generator=generator)
        for spec in signature.conditions
        if spec.num_classes is None and spec.dtype.is_floating_point
    }
    return {**drawn, **given}


def _quality(program: Program, engine: OnnxRuntimeEngine, source: Source) -> dict[str, float]:
    """Noise-prediction SQNR of the graph and of the reference engine against the float model, dB."""
    generator = torch.Generator().manual_seed(0)
    x = sampler.draw_noise(program.signature, _TRAJECTORIES, generator)
    conditions = sampler.draw_conditions(
        program.signature, _TRAJECTORIES, generator, source.conditions, program.sampler.null
    )
    graph, reference = (
        compare_noise(source.denoiser(), candidate, program.sampler, x, conditions)
        for candidate in (engine, ReferenceEngine(program))
    )
    return {"sqnr_to_float_db": graph.sqnr, "reference_engine_sqnr_to_float_db": reference.sqnr}


def states(program: Program, engine: Any, pool: dict[str, Tensor], *, one_time: bool = False) -> list[Tensor]:
    """States along the engine's own trajectories as one batch of inputs.

    Args:
        one_time: of one step only, for graphs with one timestep a call.
    """
    signature = program.signature
    fixed = signature.min_batch == signature.max_batch
    images = signature.min_batch if fixed else _IMAGES
    generator = torch.Generator().manual_seed(0)
    images = -(-images // program.sampler.branches)
    x = sampler.draw_noise(signature, images, generator)
    conditions = sampler.draw_conditions(signature, images, generator, pool, program.sampler.null)
    # Under guidance half of the rows are without condition; a fixed batch of 1 keeps the one with.
    rows = guidance.both_branches(program.sampler, conditions)
    kept = slice(-signature.min_batch if fixed else 0, None)
    steps = len(sampler.timesteps(program.sampler))
    wanted = {steps // 2} if one_time or fixed else {round(i * (steps - 1) / (_STATES - 1)) for i in range(_STATES)}
    found: list[tuple[Tensor, Tensor]] = []

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        if index in wanted:
            some = x_in[kept].clone()
            found.append((some, torch.full((len(some),), t, dtype=torch.float64).to(signature.inputs[1].dtype)))

    sampler.sample(engine, program.sampler, x, conditions, generator=torch.Generator().manual_seed(0), hook=hook)
    repeated = [c[kept].repeat(len(found), *[1] * (c.dim() - 1)) for c in rows]
    return [torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found]), *repeated]


def _sentence(broken: list[str]) -> str:
    return (
        f"the ONNX graph computes something else than the reference engine in {len(broken)} place(s): {'; '.join(broken[:3])}. "
        "Processors without VNNI add 8-bit products with saturation; on any other this is a bug. Nothing was written "
        "(--no-check writes all the same)"
    )
