"""A loaded model with everything needed to capture and calibrate it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edadm_compile.calibration.schedulers import fractional_timestep
from edadm_compile.errors import InputError
from edadm_compile.frontend.added_conditions import with_flat_conditions
from edadm_compile.frontend.guidance import GuidanceOptions, check_null, guided_sampler
from edadm_compile.ir.analysis import shapes_only
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature, text_of
from edadm_compile.ir.timesteps import as_timesteps
from edadm_compile.passes.capture import export_module, pick_tensor
from edadm_compile.passes.trace import trace


@dataclass(frozen=True)
class Source:
    """A model to compile.

    Attributes:
        signature: how it is called.
        sampler: which sampler it is compiled for.
        module: the eager model in float32 and eval mode, or None when only a graph exists.
        exported: an exported program, or None when capture starts from `module`.
        fixed: keyword arguments passed unchanged on every call.
        conditions: the user's condition tensors by name, rows to draw calibration conditions from.
        null: rows [1, ...] of the unconditional branch, where they came with the conditions (those of the empty prompt).
        origin: file name, hash and class, for the artifact.
        other_shapes: further [C, H, W] of x that the quantization of the first one is carried over to.
    """

    signature: Signature
    sampler: SamplerSpec
    module: nn.Module | None = None
    exported: ExportedProgram | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Tensor] = field(default_factory=dict)
    null: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    other_shapes: tuple[tuple[int, ...], ...] = ()

    def with_other_shapes(self, shapes: Sequence[tuple[int, ...]]) -> Source:
        """The same model, to be compiled for further shapes of x too.

        Raises:
            InputError: a shape that is there already or has other channels, or a graph that was captured elsewhere.
        """
        seen = [self.signature.inputs[0].shape]
        for shape in shapes:
            text = text_of(shape)
            if self.module is None:
                raise InputError(
                    f"--shape {text}: a torch.export archive holds the graph of one shape; for several give the module itself"
                )
            if tuple(shape) in seen:
                raise InputError(f"--shape {text} is given twice; each shape of a file once")
            if len(shape) != len(seen[0]) or shape[0] != seen[0][0]:
                raise InputError(
                    f"--shape {text}: got {shape[0]} channels, the first shape has {seen[0][0]}; shapes of one file differ in "
                    "height and width"
                )
            seen.append(tuple(shape))
        return replace(self, other_shapes=tuple(seen[1:]))

    def at(self, shape: tuple[int, ...]) -> Source:
        """The same model with x of another shape [C, H, W], and no further ones."""
        x, *others = self.signature.inputs
        signature = replace(self.signature, inputs=(replace(x, shape=shape), *others))
        return replace(self, signature=signature, other_shapes=())

    def export(self) -> tuple[ExportedProgram, Signature]:
        """The exported program and the signature with its batch limits."""
        if self.exported is not None:
            return self.exported, self.signature
        assert self.module is not None
        return export_module(self.module, self.signature, self.fixed)

    def parameters(self) -> int:
        """Number of parameters."""
        owner = self.module if self.module is not None else self.exported
        assert owner is not None
        return sum(p.numel() for p in owner.parameters())

    def parameter_bytes(self) -> int:
        """Size of the parameters in fp16, the usual way to ship a UNet."""
        return 2 * self.parameters()

    def provenance(self) -> dict[str, Any]:
        """Where the model came from; the configuration of a diffusers model too, which pipelines read."""
        config = getattr(self.module, "config", None)
        extra = {"config": _plain(config)} if isinstance(config, Mapping) else {}
        return {**self.origin, "class": self.signature.source, "parameters": self.parameters(), **extra}

    def guided(self, options: GuidanceOptions) -> Source:
        """The same model with a sampler that uses guidance.

        Raises:
            InputError: contradicting or missing options, or a null condition that the model does not take.
        """
        sampler = guided_sampler(self.sampler, self.signature, options, self.module, self.null)
        source = replace(self, sampler=sampler)
        if sampler.null:
            check_null(source.denoiser(), self.signature, sampler)
        return source

    def denoiser(self) -> Any:
        """The float model as ``(x, t, *conditions) -> prediction``: the eager module, else the exported program."""
        module = self.module
        if module is None:
            return trace(*self.export(), self.sampler).fork()
        dtype = self.signature.inputs[1].dtype
        names = [spec.name for spec in self.signature.conditions]

        def call(x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
            with torch.no_grad():
                given = dict(zip(names, conditions, strict=True))
                return pick_tensor(module(x, as_timesteps(t, dtype), **given, **self.fixed))

        return call


def _plain(value: Any) -> Any:
    """A configuration without what JSON cannot hold (such entries, and those of a path on this machine, are left out)."""
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if not str(k).startswith("_")}
        return {
            k: _plain(v)
            for k, v in kept.items()
            if isinstance(v, (str, int, float, bool, list, tuple, Mapping, type(None)))
        }
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def source_from_module(
    module: nn.Module,
    sampler: SamplerSpec,
    *,
    shape: tuple[int, int, int] | None = None,
    conditions: dict[str, Tensor] | None = None,
    num_classes: dict[str, int] | None = None,
    fixed: dict[str, Any] | None = None,
    origin: dict[str, Any] | None = None,
    guidance: GuidanceOptions | None = None,
    other_shapes: Sequence[tuple[int, int, int]] = (),
) -> Source:
    """Wrap an eager module called as ``forward(x, t, *conditions)``.

    Args:
        shape: [C, H, W] of x; inferred from the module's configuration where possible.
        conditions: example condition tensors [N, ...] by forward parameter name.
        num_classes: label conditions by name, drawn at random.
        guidance: scale and unconditional branch of classifier-free guidance.
        other_shapes: further [C, H, W] of x to compile for.

    Raises:
        InputError: something that cannot be inferred was not given.
    """
    module = with_flat_conditions(module.float().eval().requires_grad_(False))
    conditions, num_classes = conditions or {}, num_classes or {}
    names = _parameters(module, set(conditions) | set(num_classes), set(fixed or {}))
    shape = shape or _infer_shape(module)
    of_diffusers = any(cls.__module__.startswith("diffusers.models.") for cls in type(module).__mro__)
    output = "sample" if hasattr(module, "config") and of_diffusers else "tensor"
    inputs = [InputSpec(names[0], shape, torch.float32, "x"), InputSpec(names[1], (), torch.int64, "t")]
    for name in names[2:]:
        if name in num_classes:
            inputs.append(InputSpec(name, (), torch.int64, "cond", num_classes[name]))
        else:
            value = conditions[name]
            inputs.append(InputSpec(name, tuple(value.shape[1:]), value.dtype, "cond"))
    inputs[1] = _timestep_spec(module, inputs, fixed or {}, fractional_timestep(sampler))
    signature = Signature(tuple(inputs), output, max_batch=1, source=type(module).__name__)
    source = Source(signature, sampler, module, None, fixed or {}, conditions, origin=origin or {})
    source = source.with_other_shapes(other_shapes)
    return source if guidance is None else source.guided(guidance)


def _parameters(module: nn.Module, given: set[str], fixed: set[str]) -> list[str]:
    """Forward parameter names to capture: x, t, every required condition, optional ones that have values."""
    parameters = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY, p.KEYWORD_ONLY)
    ]
    if len(parameters) < 2:
        raise InputError(
            f"{type(module).__name__}.forward takes {len(parameters)} argument(s); expected forward(x, t, *conditions)"
        )
    known = {p.name for p in parameters}
    unknown = sorted(given - known)
    if unknown:
        raise InputError(
            f"condition {unknown[0]!r} is not a parameter of {type(module).__name__}.forward; it takes {', '.join(p.name for p in parameters)}"
        )
    names = [p.name for p in parameters[:2]]
    for p in parameters[2:]:
        if p.name in given:
            names.append(p.name)
        elif p.default is p.empty and p.name not in fixed:
            raise InputError(
                f"{type(module).__name__}.forward needs a condition {p.name!r} whose shape cannot be inferred; give example values "
                f"with --cond FILE.safetensors holding a tensor {p.name!r} [N, ...]"
            )
    return names


def _infer_shape(module: nn.Module) -> tuple[int, int, int]:
    config = getattr(module, "config", None)
    holders = [config] if config is not None else [module]
    channels = next(
        (v for h in holders for n in ("in_channels", "channels") if isinstance(v := getattr(h, n, None), int)), None
    )
    size = next(
        (
            v
            for h in holders
            for n in ("sample_size", "image_size", "img_resolution", "resolution")
            if isinstance(v := getattr(h, n, None), (int, tuple, list))
        ),
        None,
    )
    if channels is None:
        first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
        channels = first.in_channels if first is not None else None
    if channels is None or size is None:
        raise InputError(f"the input shape of {type(module).__name__} cannot be inferred; give it with --shape C,H,W")
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, int(height), int(width))


def _shapes_only(module: nn.Module) -> AbstractContextManager[Any]:
    """Fake tensors for diffusers' UNets, which take timesteps of every type: their call checks shapes alone.

    Other modules compute: fake tensors let products of mixed types pass that the real ones refuse.
    """
    if type(module).__module__.startswith("diffusers.models.unets."):
        return shapes_only()
    return nullcontext()


def _timestep_spec(
    module: nn.Module, inputs: list[InputSpec], fixed: dict[str, Any], fractional: float | None
) -> InputSpec:
    """Integer timesteps when the model takes them and the sampler gives them, else float32: found by calling it once.

    Args:
        fractional: a timestep of the sampler that is not whole, if there is one.
    """
    problems = []
    for dtype in (torch.int64, torch.float32) if fractional is None else (torch.float32,):
        values = [torch.zeros((2, *s.shape), dtype=dtype if s.role == "t" else s.dtype) for s in inputs]
        try:
            with torch.no_grad(), _shapes_only(module):
                pick_tensor(
                    module(
                        values[0],
                        values[1],
                        **dict(zip([s.name for s in inputs[2:]], values[2:], strict=True)),
                        **fixed,
                    )
                )
            return InputSpec(inputs[1].name, (), dtype, "t")
        except Exception as error:  # any failure of foreign code: report it below
            problems.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    shapes = ", ".join(f"{s.name} {[2, *s.shape]}" for s in inputs)
    if fractional is not None:
        raise InputError(
            f"{type(module).__name__} cannot be called with fractional timesteps, and the scheduler gives {fractional:g}; set its "
            f'"timestep_spacing" to "leading" or "trailing", or take another scheduler ({shapes}: {problems[0]})'
        )
    raise InputError(f"{type(module).__name__} cannot be called with {shapes}: {problems[0]}")
