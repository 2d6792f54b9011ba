"""Files with programs for several shapes: which one a verb takes, and what it says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edadm_compile.driver.options import shapes_of
from edadm_compile.errors import ConfigError, InputError
from edadm_compile.frontend import Source
from edadm_compile.ir.program import text_of
from edadm_compile.runtime.artifact import Artifact


def all_shapes(source: Source) -> list[list[int]]:
    """[C, H, W] of x for every shape that a source is compiled for."""
    return [list(shape) for shape in (source.signature.inputs[0].shape, *source.other_shapes)]


def choose(loaded: Artifact, options: dict[str, Any]) -> tuple[Artifact, dict[str, Any]]:
    """The programs of the shape that ``--shape`` names, or of the first, and the options to load a float model for it.

    A file with one shape is taken as it is; ``--shape`` then only says how to load the float model.

    Raises:
        InputError: a shape that was not compiled.
    """
    if not loaded.others:
        return loaded, options
    asked = shapes_of(options)
    shape = asked[0] if asked else loaded.shapes[0]
    return loaded.at(shape), {**options, "shape": text_of(shape)}


def told(loaded: Artifact, chosen: Artifact) -> dict[str, Any]:
    """Entries of a result that say which shape it is about; none for a file with one."""
    if not loaded.others:
        return {}
    return {"shape": list(chosen.shapes[0]), "shapes": [list(shape) for shape in loaded.shapes]}


def sized(path: Path, loaded: Artifact, chosen: Artifact) -> Path:
    """A default file name with the size in it, where the file has several shapes."""
    if not loaded.others:
        return path
    return path.with_name(f"{path.stem}_{'x'.join(map(str, chosen.shapes[0]))}{path.suffix}")


def targets_for(options: dict[str, Any], targets: str | None, say: Callable[[str], None]) -> str | None:
    """The GPU code to make: none for several shapes, which is said where nothing else was asked for."""
    if len(shapes_of(options)) < 2 or targets is not None:
        return targets
    say("several shapes: no GPU code is made (a file with GPU code has one shape)")
    return "none"


def check_targets(shapes: int, targets: tuple[str, ...]) -> None:
    """Refuse GPU code for several shapes before the work.

    Raises:
        ConfigError: both were asked for.
    """
    if shapes > 1 and targets:
        raise ConfigError(
            f"{shapes} shapes and targets {', '.join(targets)} exclude each other: GPU code is made for files of one shape; "
            "compile a file for each shape, or with --targets none"
        )


def check_one_shape(loaded: Artifact) -> None:
    """Refuse GPU code for a file that has several shapes.

    Raises:
        InputError: it has.
    """
    if loaded.others:
        raise InputError(
            f"GPU code: the file has {len(loaded.shapes)} shapes ({'; '.join(map(text_of, loaded.shapes))}), GPU code is made "
            "for files of one; compile the model again with one --shape"
        )
