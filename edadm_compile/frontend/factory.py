"""State dicts with the user's code that builds the module, and pickled modules; nothing is opened as a pickle unasked."""

from __future__ import annotations

import importlib
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile.errors import EdadmError, InputError
from edadm_compile.frontend.torch_file import read_torch_file
from edadm_compile.frontend.zip_check import is_zip


def pickle_message(path: Path, error: Exception) -> str:
    """Why torch's restricted unpickler refused a file, and what to do."""
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


def trusted_load(path: Path) -> Any:
    """Open a pickle, which runs its code: only on the user's word.

    Raises:
        InputError: it fails.
    """
    _see_own_packages()
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"{path} cannot be unpickled: {type(error).__name__}: {error}") from error


def from_factory(name: str, path: Path) -> nn.Module:
    """The module that ``package.module:callable`` builds, with the weights of a file.

    Raises:
        InputError: the callable fails, or weights and module do not fit.
    """
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
        state = read_torch_file(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(pickle_message(path, error)) from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict")
    return state
