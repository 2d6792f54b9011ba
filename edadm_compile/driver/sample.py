"""Generate images with a compiled model, beside the float model's from the same noise."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from edadm_compile.calibration.guidance import labels_in_turn
from edadm_compile.calibration.sampler import draw_conditions, draw_noise, make_scheduler, read_scheduler, timesteps
from edadm_compile.calibration.sampler import sample as run_sampler
from edadm_compile.driver import shapes
from edadm_compile.driver.options import condition_options, guidance_options, load_options
from edadm_compile.driver.outputs import check_writable
from edadm_compile.errors import InputError
from edadm_compile.evaluate.metrics import psnr
from edadm_compile.frontend import Decoder, Encoded, find_autoencoder, guided_sampler, load_source
from edadm_compile.ir.program import SamplerSpec, Signature
from edadm_compile.parallel.world import World, divided
from edadm_compile.passes.base import Progress, Silent
from edadm_compile.report.tables import console
from edadm_compile.runtime.artifact import read, write_atomically
from edadm_compile.runtime.session import CompiledModel, from_artifact

_BATCH = 64


def run(
    artifact: Path,
    count: int,
    output: Path,
    reference: Path | None,
    label: int | None,
    seed: int,
    engine: str | None = None,
    decode: bool = False,
    vae: Path | None = None,
    progress: Progress | None = None,
    world: World | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Sample `count` images and write a grid.

    Args:
        engine: as in `edadm_compile.load`.
        decode, vae: turn latents into images with an autoencoder, found in a pipeline folder or given.
        progress: receives stages and steps.
        world: processes that share the images; the first one writes.

    Returns:
        output path, count, and the PSNR against the reference where one is given.

    Raises:
        EdadmError: unreadable files, or a reference that does not match.
    """
    world = world or World()
    if world.leads:
        check_writable(output)
    whole = read(artifact, device_code=False)
    chosen, options = shapes.choose(whole, options)
    model = from_artifact(chosen, engine=engine)
    place = options.get("pipeline") or reference
    decoder = Decoder(vae or find_autoencoder(place)) if decode or vae is not None else None
    text = condition_options(options, place, model.signature)
    spec = chosen_sampler(model, options, text.null)
    noise, conditions = inputs(model, spec, count, seed, label, text, in_turn=options.get("prompts") is not None)
    progress = progress or Silent()
    progress.stage("sampling", _calls(spec, count))
    images = generate(spec, divided(model.predict, world), noise, conditions, seed, progress)
    images = images if decoder is None else decoder(images)
    result: dict[str, Any] = {"output": str(output), "count": count, "steps": spec.steps, "engine": model.engine_name,
                              "scheduler": spec.scheduler["_class_name"], "guidance": spec.guidance}  # fmt: skip
    result |= shapes.told(whole, chosen)
    rows = [images]
    if reference is not None:
        source = load_source(reference, dataclasses.replace(load_options(options, spec), known_conditions=text))
        progress.stage("float model", _calls(spec, count))
        originals = generate(spec, divided(source.denoiser(), world), noise, conditions, seed, progress)
        originals = originals if decoder is None else decoder(originals)
        values = psnr(originals, images)
        result["psnr_db"] = {
            "median": float(values.median()),
            "mean": float(values.mean()),
            "worst": float(values.min()),
        }
        rows = [originals, images]
    if spec.guided and not model.sampler.guided:
        result["note"] = (
            "the file was calibrated without guidance: its quantizers have not seen the unconditional branch"
        )
    if world.leads:
        zoom = {} if decoder is None else {"zoom": 1}
        write_grid(rows, output, columns_for(model.signature, spec, count), **zoom)
    return result


def inputs(
    model: CompiledModel,
    sampler: SamplerSpec,
    count: int,
    seed: int,
    label: int | None,
    text: Encoded,
    *,
    in_turn: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Noise and conditions for `count` images; labels in turn unless one is asked for.

    Args:
        text: the user's condition tensors.
        in_turn: image i has row i of them (and so on from the first), in place of one drawn at random.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(model.signature, count, generator)
    tensors = text.conditions
    conditions = draw_conditions(model.signature, count, generator, tensors, sampler.null)
    if label is not None and not any(
        s.num_classes is not None and s.name not in tensors for s in model.signature.conditions
    ):
        raise InputError("--label: the model takes no class label that is drawn here")
    for index, spec in enumerate(model.signature.conditions):
        if in_turn and spec.name in tensors:
            given = tensors[spec.name]
            conditions[index] = given[torch.arange(count) % len(given)].to(spec.dtype)
        if spec.num_classes is not None and spec.name not in tensors:
            if label is not None and not 0 <= label < spec.num_classes:
                raise InputError(f"--label: got {label}, allowed 0 to {spec.num_classes - 1}")
            null = sampler.null[index] if sampler.null else None
            labels = labels_in_turn(count, spec.num_classes, null)
            conditions[index] = labels if label is None else torch.full((count,), label)
    return noise, conditions


def chosen_sampler(
    model: CompiledModel, options: dict[str, Any], empty: dict[str, Tensor] | None = None
) -> SamplerSpec:
    """The sampler the model was compiled for, unless another is asked for (its timesteps then miss the tables).

    Args:
        options: scheduler, steps, eta, guidance, null_label and uncond of the command line, None where not given.
        empty: rows of the unconditional branch for options that give none.

    Raises:
        InputError: a sampler that cannot be made, or guidance without an unconditional branch.
    """
    scheduler, steps, eta = options.get("scheduler"), options.get("steps"), options.get("eta")
    spec = model.sampler
    if scheduler is not None:
        spec = dataclasses.replace(spec, scheduler=read_scheduler(scheduler), eta=0.0)
    spec = dataclasses.replace(
        spec, steps=spec.steps if steps is None else steps, eta=spec.eta if eta is None else eta
    )  # fmt: skip
    spec = guided_sampler(spec, model.signature, guidance_options(options), empty=empty)
    make_scheduler(spec)  # refuse a bad one before the float model is loaded
    return spec


def _calls(spec: SamplerSpec, count: int) -> int:
    """Calls of the model for `count` images."""
    return len(timesteps(spec)) * -(-count // _BATCH)


def generate(
    spec: SamplerSpec, denoiser: Any, noise: Tensor, conditions: list[Tensor], seed: int,
    progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """Images [N, C, H, W] from a denoiser, in batches, with one sampler."""
    parts = []
    advance = (progress or Silent()).advance

    def hook(index: int, t: float, x_in: Tensor, prediction: Tensor) -> None:
        advance(1, f"t={t:g}")

    for number, rows in enumerate(torch.arange(noise.shape[0]).split(_BATCH)):
        generator = torch.Generator().manual_seed(seed + number)
        parts.append(
            run_sampler(denoiser, spec, noise[rows], [c[rows] for c in conditions], generator=generator, hook=hook)
        )
    return torch.cat(parts)


def columns_for(signature: Signature, sampler: SamplerSpec, count: int) -> int:
    """Images per row: one of each class, else a near-square."""
    found = next((i for i, s in enumerate(signature.conditions) if s.num_classes), None)
    classes = None
    if found is not None:
        number = signature.conditions[found].num_classes or 0
        null = sampler.null[found] if sampler.null else None
        classes = int(labels_in_turn(number, number, null).unique().numel())
    return min(count, classes) if classes and classes <= 20 else max(1, round(count**0.5))


def write_grid(rows: list[Tensor], path: Path, columns: int, zoom: int = 3) -> None:
    """Write images in [-1, 1] as a PNG; with two sets each strip shows the first above the second.

    Args:
        rows: one or two tensors [N, C, H, W] with C 1, 3 or more (the first three channels are shown).
    """
    count = rows[0].shape[0]
    columns = min(columns, count)
    strips = []
    for start in range(0, count, columns):
        for images in rows:
            strip = images[start : start + columns]
            missing = columns - strip.shape[0]
            if missing:
                strip = torch.cat((strip, strip.new_full((missing, *strip.shape[1:]), 1.0)))
            strips.append(torch.cat(list(torch.nn.functional.pad(strip, (1, 1, 1, 1), value=1.0)), dim=2))
    picture = ((torch.cat(strips, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = picture[:1].repeat(3, 1, 1) if picture.shape[0] < 3 else picture[:3]
    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def print_result(result: dict[str, Any]) -> None:
    """Print what was written."""
    out = console()
    out.print(
        f"{result['count']} images, {result['steps']} steps of {result['scheduler']}, guidance {result['guidance']:g}, on the "
        f"{result['engine']} engine → {result['output']}"
    )
    if "note" in result:
        out.print(f"note: {result['note']}", highlight=False)
    if "psnr_db" in result:
        value = result["psnr_db"]
        out.print(
            f"PSNR to the float model from the same noise: median {value['median']:.1f}, mean {value['mean']:.1f}, worst {value['worst']:.1f} dB"
        )
