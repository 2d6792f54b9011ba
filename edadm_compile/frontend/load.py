"""Find out what a path holds and load it, never opening a pickle unasked."""

from __future__ import annotations

import hashlib
import importlib
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.calibration.sampler import make_scheduler, read_scheduler
from edadm_compile.errors import EdadmError, InputError
from edadm_compile.frontend import checkpoint, diffusers_folder, exported
from edadm_compile.frontend.conditions import read_conditions
from edadm_compile.frontend.guidance import GuidanceOptions
from edadm_compile.frontend.source import Source, source_from_module
from edadm_compile.frontend.torch_file_check import check_torch_file
from edadm_compile.frontend.zip_check import is_zip
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
        known_sampler: used when neither the options nor the files beside the model give one (a compiled model's).
        guidance: scale and unconditional branch of classifier-free guidance.
    """

    shape: tuple[int, int, int] | None = None
    scheduler: Path | None = None
    steps: int | None = None
    eta: float = 0.0
    conditions: Path | None = None
    factory: str | None = None
    trust_pickle: bool = False
    known_sampler: SamplerSpec | None = None
    guidance: GuidanceOptions | None = None


def load_source(path: Path, options: LoadOptions | None = None) -> Source:
    """Load whatever `path` holds.

    Raises:
        InputError: what the file is, why it cannot be used, and what to do.
    """
    options = options or LoadOptions()
    source = _load(path, options)
    return source if options.guidance is None else source.guided(options.guidance)


def _load(path: Path, options: LoadOptions) -> Source:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder")
    pool = read_conditions(options.conditions)
    if path.is_dir():
        return diffusers_folder.load(path, lambda found: _sampler(options, found, None), options.shape, pool)
    origin = {"file": path.name, "sha256": sha256(path)}
    if exported.is_exported_program(path):
        sampler = _sampler(options, _scheduler_beside(path), None)
        return exported.load(path, sampler, pool, origin, trusted=options.trust_pickle)
    if options.factory is not None:
        module = _from_factory(options.factory, path)
        return source_from_module(
            module,
            _sampler(options, _scheduler_beside(path), None),
            shape=options.shape,
            conditions=pool,
            origin=origin,
        )
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path} holds only tensors; name the code that builds the model with --factory package.module:callable"
        )
    return _load_pickle_like(path, options, pool, origin)


def _load_pickle_like(path: Path, options: LoadOptions, pool: dict[str, Tensor], origin: dict[str, Any]) -> Source:
    """torch.save files: our checkpoint dictionary, a bare state dict, or a pickled module."""
    try:
        if not options.trust_pickle:
            check_torch_file(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        if not options.trust_pickle:
            raise InputError(_pickle_message(path, error)) from None
        value = _trusted_load(path)
    if isinstance(value, nn.Module):
        return source_from_module(
            value, _sampler(options, _scheduler_beside(path), None), shape=options.shape, conditions=pool, origin=origin
        )
    if checkpoint.is_checkpoint(value):
        return checkpoint.load(
            value, path, lambda config, steps: _sampler(options, config, steps), options.shape, pool, origin
        )
    if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
        raise InputError(
            f"{path} is a bare state dict ({len(value)} tensors); name the code that builds the model with --factory package.module:callable"
        )
    raise InputError(
        f"{path} holds a {type(value).__name__}, not a model; expected a checkpoint dictionary (docs/inputs.md), a .pt2 archive or a diffusers folder"
    )


def _pickle_message(path: Path, error: Exception) -> str:
    foreign = f"{path} is not a model file: neither a torch file, a .pt2 archive nor safetensors"
    if is_zip(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if not any(name.endswith("data.pkl") for name in archive.namelist()):
                    return foreign
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
            return f"{path} is a damaged torch file; copy or save it again"
    else:
        with path.open("rb") as stream:
            start = stream.read(2)
        if start == b"PK":
            return f"{path} is a damaged torch file: its end is missing; copy or save it again"
        if not start.startswith(b"\x80"):
            return foreign
    reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:200]
    return (
        f"{path} is a pickled Python object, which can run any code when opened ({reason}). Three safe ways: "
        "(1) torch.export.save(torch.export.export(model, (x, t)), 'model.pt2') and compile that; "
        "(2) torch.save(model.state_dict(), FILE) and --factory package.module:callable; "
        "(3) a diffusers folder (model.save_pretrained). If you made the file yourself: --trust-pickle"
    )


def _trusted_load(path: Path) -> Any:
    _see_own_packages()
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"{path} cannot be unpickled: {type(error).__name__}: {error}") from error


def _from_factory(name: str, path: Path) -> nn.Module:
    module = _call_factory(name)
    state = _without_prefix(_state_dict(path), set(module.state_dict()))
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InputError(
            f"{path} does not fit the module that {name} builds: {str(error).splitlines()[-1].strip()}"
        ) from None
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} tensor(s) that {name} needs, such as {missing[0]!r}; unexpected in the file: {list(unexpected)[:3]}"
        )
    if unexpected:
        raise InputError(
            f"{path} holds {len(unexpected)} tensor(s) that the module of {name} has no place for, such as {unexpected[0]!r}: "
            "the factory builds another model, or the file needs a state dict of the model alone"
        )
    return module


def _without_prefix(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The model's part of a trainer's state dict (``module.``, ``model.diffusion_model.``), when exactly one prefix fits."""
    if not wanted or wanted <= set(state):
        return state
    example = min(wanted)
    prefixes = [key.removesuffix(example) for key in state if key.endswith(f".{example}")]
    fitting = [p for p in prefixes if all(p + name in state for name in wanted)]
    if len(fitting) != 1:
        return state  # none, or several copies (an average beside the raw weights): the caller names what is missing
    return {key.removeprefix(fitting[0]): value for key, value in state.items() if key.startswith(fitting[0])}


def _see_own_packages() -> None:
    """Let imports find the user's code in the current folder, as ``python -m`` would; a console script does not."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _call_factory(name: str) -> nn.Module:
    _see_own_packages()
    package, _, attribute = name.partition(":")
    if not attribute:
        raise InputError(f"--factory: got {name!r}, expected package.module:callable")
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(package), attribute)
        module = factory()
    except EdadmError:
        raise
    except Exception as error:
        raise InputError(f"--factory {name}: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"--factory {name} returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        except Exception as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from None
    try:
        check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(_pickle_message(path, error)) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict")
    return state


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
