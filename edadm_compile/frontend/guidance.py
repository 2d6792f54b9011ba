"""Classifier-free guidance as the user asks for it: the scale, and what "without condition" means for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm_compile.errors import EdadmError, InputError
from edadm_compile.frontend.conditions import read_conditions
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature

#: Attributes in which models name their null label.
_NULL_NAMES = ("null_label", "null_class", "null_class_id")
ZEROS = "zeros"


@dataclass(frozen=True)
class GuidanceOptions:
    """What the user says about guidance.

    Attributes:
        scale: s of ``u + s (c - u)``; None keeps the sampler's.
        null_label: label of the unconditional branch, a number or "last" (the last of the model's embeddings).
        uncond: safetensors file with the condition rows of that branch, or "zeros"; conditions that it does not name
            are the same in both branches.
    """

    scale: float | None = None
    null_label: str | int | None = None
    uncond: str | Path | None = None


def guided_sampler(
    sampler: SamplerSpec,
    signature: Signature,
    options: GuidanceOptions,
    model: nn.Module | None = None,
    empty: Mapping[str, Tensor] | None = None,
) -> SamplerSpec:
    """The sampler with a scale and an unconditional branch.

    Args:
        model: where a null label may be looked up that the options do not give.
        empty: rows [1, ...] of the unconditional branch by name, for options that do not give one: the empty prompt's.

    Raises:
        InputError: options that contradict each other or the model, or a scale without an unconditional branch.
    """
    given = options.null_label is not None or options.uncond is not None
    if not given and options.scale is None:
        return sampler
    if options.scale is None and not sampler.null:
        raise InputError("--null-label and --uncond are for guidance; give its scale too: --guidance SCALE")
    scale = sampler.guidance if options.scale is None else options.scale
    if not 0 <= scale < float("inf"):
        raise InputError(f"--guidance: got {scale:g}, allowed is a finite scale of 0 or more; 1 is no guidance")
    if not signature.conditions:
        raise InputError(f"--guidance {scale:g}: the model takes no condition, there is nothing to be guided by")
    if given:
        null = _null(signature, options, model)
    elif empty:
        null = tuple(empty[s.name][0].to(s.dtype) if s.name in empty else None for s in signature.conditions)
    else:
        null = sampler.null or _conventional(signature, model)
    if scale != 1 and not null:
        raise InputError(
            f'--guidance {scale:g} needs the unconditional branch: give --null-label K (or "last") for class labels, '
            f"--uncond FILE.safetensors or --uncond zeros for other conditions (--prompts brings the empty prompt); the model takes {_names(signature)}"
        )
    if any(
        row is not None and s.num_classes == 1 and not row.any()
        for s, row in zip(signature.conditions, null, strict=False)
    ):
        raise InputError("--null-label 0: it is the model's only label, there is none left to be guided by")
    return replace(sampler, guidance=float(scale), null=null)


def _null(signature: Signature, options: GuidanceOptions, model: nn.Module | None) -> tuple[Tensor | None, ...]:
    rows: dict[str, Tensor] = {}
    if options.uncond is not None:
        rows = _zeros(signature) if str(options.uncond) == ZEROS else _file(Path(options.uncond), signature)
    if options.null_label is not None:
        spec = _label(signature)
        if spec is None or spec.name in rows:
            reason = "takes no class label" if spec is None else f"gets {spec.name!r} from --uncond already"
            raise InputError(f"--null-label {options.null_label}: the model {reason}; it takes {_names(signature)}")
        rows[spec.name] = torch.tensor(_number(options.null_label, spec, model), dtype=spec.dtype)
    return tuple(rows.get(spec.name) for spec in signature.conditions)


def _label(signature: Signature) -> InputSpec | None:
    """The class label: the only condition that is one integer per image."""
    found = [s for s in signature.conditions if not s.shape and not s.dtype.is_floating_point]
    return found[0] if len(found) == 1 else None


def _number(text: str | int, spec: InputSpec, model: nn.Module | None) -> int:
    if text == "last":
        if spec.num_classes is None:
            raise InputError(f"--null-label last: the number of labels of {spec.name!r} is not known; give the number")
        return spec.num_classes - 1
    try:
        label = int(text)
    except ValueError:
        raise InputError(f'--null-label: got {text!r}, expected a label such as 10, or "last"') from None
    # With a model at hand, `check_null` finds out whether there is one embedding more than classes.
    if label < 0 or (model is None and spec.num_classes is not None and label >= spec.num_classes):
        allowed = "0 or more" if spec.num_classes is None else f"0 to {spec.num_classes - 1}"
        raise InputError(f"--null-label: got {label}, allowed is {allowed}")
    return label


def _conventional(signature: Signature, model: nn.Module | None) -> tuple[Tensor | None, ...]:
    """The null label that a model declares: by name, or as one embedding more than ``num_classes``."""
    spec = _label(signature)
    if spec is None or model is None:
        return ()
    holders = [h for h in (getattr(model, "config", None), model) if h is not None]
    named = (getattr(holder, name, None) for holder in holders for name in _NULL_NAMES)
    label = next((v for v in named if type(v) is int), None)
    if label is None:
        classes = next((v for h in holders if type(v := getattr(h, "num_classes", None)) is int), None)
        sizes = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
        label = classes if classes is not None and classes + 1 in sizes else None
    if label is None:
        return ()
    return tuple(torch.tensor(label, dtype=s.dtype) if s is spec else None for s in signature.conditions)


def _zeros(signature: Signature) -> dict[str, Tensor]:
    rows = {s.name: torch.zeros(s.shape, dtype=s.dtype) for s in signature.conditions if s.dtype.is_floating_point}
    if not rows:
        raise InputError(f"--uncond zeros: no condition of the model is a float tensor; it takes {_names(signature)}")
    return rows


def _file(path: Path, signature: Signature) -> dict[str, Tensor]:
    """One row of each condition in a file."""
    specs = {s.name: s for s in signature.conditions}
    rows = {}
    for name, value in read_conditions(path, "--uncond").items():
        if name not in specs:
            raise InputError(f"--uncond {path}: {name!r} is no condition of the model; it takes {_names(signature)}")
        spec = specs[name]
        if tuple(value.shape) != (1, *spec.shape):
            raise InputError(
                f"--uncond {path}: {name!r} has shape {list(value.shape)}, expected one row {[1, *spec.shape]}"
            )
        if value.is_floating_point() != spec.dtype.is_floating_point or not bool(torch.isfinite(value).all()):
            raise InputError(f"--uncond {path}: {name!r} holds {value.dtype}, expected finite {spec.dtype} values")
        rows[name] = value[0].to(spec.dtype)
    if not rows:
        raise InputError(f"--uncond {path}: the file holds no tensor; the model takes {_names(signature)}")
    return rows


def _names(signature: Signature) -> str:
    return ", ".join(f"{s.name} {[*s.shape]}" for s in signature.conditions)


def check_null(model: Callable[..., Tensor], signature: Signature, sampler: SamplerSpec) -> None:
    """Call the model once with the conditions of the unconditional branch.

    Raises:
        InputError: it fails, for example on a label beyond its embeddings.
    """
    batch = max(signature.min_batch, 1)
    shapes = [torch.zeros((batch, *s.shape), dtype=s.dtype) for s in signature.inputs]
    rows = [z if n is None else n.expand_as(z) for z, n in zip(shapes[2:], sampler.null, strict=True)]
    try:
        with torch.no_grad():
            model(*shapes[:2], *rows)
    except EdadmError:
        raise
    except Exception as error:  # any failure of foreign code
        pairs = zip(signature.conditions, sampler.null, strict=True)
        values = [f"{s.name}={int(n)}" if not n.dim() else s.name for s, n in pairs if n is not None]
        classes = next((f" ({s.num_classes} labels are known)" for s in signature.conditions if s.num_classes), "")
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"the model fails on the unconditional branch {', '.join(values)}{classes}: {text}; give another --null-label or --uncond"
        ) from error
