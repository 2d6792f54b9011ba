"""Command-line options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edadm_compile.errors import InputError, did_you_mean
from edadm_compile.frontend import Encoded, GuidanceOptions, LoadOptions, gather
from edadm_compile.ir.program import SamplerSpec, Signature


def load_options(options: dict[str, Any], known_sampler: SamplerSpec | None = None) -> LoadOptions:
    """Options that say how to load a float model; `known_sampler` stands in where no scheduler is found.

    Raises:
        InputError: a malformed ``--shape``.
    """
    shapes = shapes_of(options)
    return LoadOptions(
        shape=shapes[0] if shapes else None,
        other_shapes=shapes[1:],
        scheduler=options.get("scheduler"),
        steps=options.get("steps"),
        conditions=options.get("conditions"),
        factory=options.get("factory"),
        trust_pickle=bool(options.get("trust_pickle")),
        prompts=options.get("prompts"),
        pipeline=options.get("pipeline"),
        original_config=options.get("original_config"),
        known_sampler=known_sampler,
    )


def condition_options(options: dict[str, Any], place: Path | None, signature: Signature) -> Encoded:
    """Condition tensors of ``--cond`` and ``--prompts`` for a model with this signature.

    Args:
        place: a model file or folder where the text encoders may be, without ``--pipeline``.

    Raises:
        InputError: files that cannot be used, or a condition that the model does not take.
    """
    height, width = signature.inputs[0].shape[1:]
    tensors, prompts = options.get("conditions"), options.get("prompts")
    text = gather(tensors, prompts, options.get("pipeline") or place, (height, width))
    names = [spec.name for spec in signature.conditions]
    if unknown := sorted(set(text.conditions) - set(names)):
        given = f"--cond {tensors}" if prompts is None else f"--prompts {prompts}"
        near = did_you_mean(unknown[0], names)
        raise InputError(
            f"{given}: {unknown[0]!r} is no condition of the model; it takes {', '.join(names) or 'none'}{near}"
        )
    return text


def guidance_options(options: dict[str, Any]) -> GuidanceOptions:
    """Options that say what guidance a sampler uses."""
    return GuidanceOptions(options.get("guidance"), options.get("null_label"), options.get("uncond"))


def shapes_of(options: dict[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """Every ``--shape``, in order: a text, or several where a verb takes several.

    Raises:
        InputError: a malformed one.
    """
    given = options.get("shape") or ()
    return tuple(parse_shape(text) for text in ((given,) if isinstance(given, str) else given))


def parse_shape(text: str) -> tuple[int, int, int]:
    """``C,H,W`` as three positive integers.

    Raises:
        InputError: anything else.
    """
    try:
        values = tuple(int(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values) < 1:
        raise InputError(f"--shape: got {text!r}, expected C,H,W such as 3,32,32")
    return values


def parse_batches(text: str | None) -> tuple[int, ...] | None:
    """``1,8,64`` as ascending batch sizes.

    Raises:
        InputError: anything else.
    """
    if text is None:
        return None
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < 1:
        raise InputError(f"--batch: got {text!r}, expected positive integers joined by commas, such as 1,8,64")
    return found
