"""Find out what a path holds and load it, never opening a pickle unasked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edadm_compile.calibration.sampler import make_scheduler, read_scheduler
from edadm_compile.errors import InputError
from edadm_compile.frontend import checkpoint, diffusers_folder, exported, original
from edadm_compile.frontend.conditions import gather, sample_size
from edadm_compile.frontend.factory import from_factory, pickle_message, trusted_load
from edadm_compile.frontend.guidance import GuidanceOptions
from edadm_compile.frontend.original_weights import Weights, find_weights, read_safetensors
from edadm_compile.frontend.prompts import Encoded
from edadm_compile.frontend.source import Source, source_from_module
from edadm_compile.frontend.torch_file import read_torch_file
from edadm_compile.ir.program import SamplerSpec

_DEFAULT_STEPS = 50


@dataclass(frozen=True)
class LoadOptions:
    """What the user adds to the path.

    Attributes:
        shape: [C, H, W] of x.
        scheduler: path of a diffusers scheduler_config.json.
        steps: sampler steps.
        eta: DDIM noise level.
        conditions: path of a safetensors file with condition tensors.
        factory: ``package.module:callable`` that builds the module for a state-dict file.
        trust_pickle: open pickled modules.
        prompts: path of a text file with one prompt a line, encoded as calibration conditions.
        pipeline: diffusers pipeline folder with the text encoders; by default the one that the path is, or lies in.
        original_config: YAML file of a checkpoint in its authors' layout.
        known_conditions: used in place of `conditions` and `prompts`.
        known_sampler: used when neither the options nor the files beside the model give one (a compiled model's).
        guidance: scale and unconditional branch of classifier-free guidance.
        other_shapes: further [C, H, W] of x to compile for.
    """

    shape: tuple[int, int, int] | None = None
    scheduler: Path | None = None
    steps: int | None = None
    eta: float = 0.0
    conditions: Path | None = None
    factory: str | None = None
    trust_pickle: bool = False
    prompts: Path | None = None
    pipeline: Path | None = None
    original_config: Path | None = None
    known_conditions: Encoded | None = None
    known_sampler: SamplerSpec | None = None
    guidance: GuidanceOptions | None = None
    other_shapes: tuple[tuple[int, int, int], ...] = ()


def load_source(path: Path, options: LoadOptions | None = None) -> Source:
    """Load whatever `path` holds.

    Raises:
        InputError: what the file is, why it cannot be used, and what to do.
    """
    options = options or LoadOptions()
    source = _load(path, options).with_other_shapes(options.other_shapes)
    return source if options.guidance is None else source.guided(options.guidance)


def _load(path: Path, options: LoadOptions) -> Source:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder")
    if path.is_dir():
        return diffusers_folder.load(
            path,
            lambda found: _sampler(options, found, None),
            options.shape,
            lambda config: _conditions(options, path, config),
        )
    origin = {"file": path.name, "sha256": sha256(path)}
    if exported.is_exported_program(path):
        pool = _conditions(options, path, {}).conditions
        sampler = _sampler(options, _scheduler_beside(path), None)
        return exported.load(path, sampler, pool, origin, trusted=options.trust_pickle)
    if options.factory is not None:
        pool = _conditions(options, path, {}).conditions
        module = from_factory(options.factory, path)
        return source_from_module(
            module,
            _sampler(options, _scheduler_beside(path), None),
            shape=options.shape,
            conditions=pool,
            origin=origin,
        )
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
        if weights is not None:
            return _load_original(weights, path, options, origin)
        raise InputError(
            f"{path} holds only tensors; name the code that builds the model with --factory package.module:callable"
        )
    return _load_pickle_like(path, options, origin)


def _conditions(options: LoadOptions, path: Path, config: dict[str, Any]) -> Encoded:
    """What the user gives as conditions, for a model with this configuration."""
    if options.known_conditions is not None:
        return options.known_conditions
    size = sample_size(config, options.shape)
    return gather(options.conditions, options.prompts, options.pipeline or path, size)


def _load_original(weights: Weights, path: Path, options: LoadOptions, origin: dict[str, Any]) -> Source:
    """A checkpoint of the authors' own code."""
    return original.load(
        weights,
        path,
        options.original_config,
        lambda found: _sampler(options, _scheduler_beside(path) or found, None),
        options.shape,
        lambda config: _conditions(options, path, config),
        origin,
    )


def _load_pickle_like(path: Path, options: LoadOptions, origin: dict[str, Any]) -> Source:
    """torch.save files: our checkpoint dictionary, the authors' ones, a bare state dict, or a pickled module."""
    try:
        value = read_torch_file(path, check=not options.trust_pickle)
    except InputError:
        raise
    except Exception as error:
        if not options.trust_pickle:
            raise InputError(pickle_message(path, error)) from None
        value = trusted_load(path)
    if isinstance(value, nn.Module):
        pool = _conditions(options, path, {}).conditions
        return source_from_module(
            value, _sampler(options, _scheduler_beside(path), None), shape=options.shape, conditions=pool, origin=origin
        )
    if checkpoint.is_checkpoint(value):
        return checkpoint.load(
            value,
            path,
            lambda config, steps: _sampler(options, config, steps),
            options.shape,
            lambda config: _conditions(options, path, config),
            origin,
        )
    weights = find_weights(value, path)
    if weights is not None:
        return _load_original(weights, path, options, origin)
    if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
        raise InputError(
            f"{path} is a bare state dict ({len(value)} tensors); name the code that builds the model with --factory package.module:callable"
        )
    raise InputError(
        f"{path} holds a {type(value).__name__}, not a model; expected a checkpoint dictionary (docs/inputs.md), a .pt2 archive or a diffusers folder"
    )


def _scheduler_beside(path: Path) -> dict[str, Any] | None:
    candidate = path.parent / "scheduler_config.json"
    return read_scheduler(candidate) if candidate.exists() else None


def _sampler(options: LoadOptions, found: dict[str, Any] | None, steps: int | None) -> SamplerSpec:
    """The sampler from options first, then from what lay beside the model."""
    config = read_scheduler(options.scheduler) if options.scheduler is not None else found
    if config is None and options.known_sampler is not None:
        return options.known_sampler
    if config is None:
        raise InputError(
            "the sampler is unknown: give a diffusers scheduler configuration with --scheduler scheduler_config.json, for example "
            '{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}'
        )
    wanted = steps if options.steps is None else options.steps
    if wanted is None:
        length = config.get("num_train_timesteps", 1000)  # the default of every supported class
        wanted = min(_DEFAULT_STEPS, length) if isinstance(length, int) else _DEFAULT_STEPS
    spec = SamplerSpec(config, wanted, options.eta)
    make_scheduler(spec)  # refuse a bad configuration before any work
    return spec


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
