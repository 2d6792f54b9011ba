"""A compiled model that is called like its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from edadm_compile import notebook
from edadm_compile.errors import InputError
from edadm_compile.ir.program import InputSpec, SamplerSpec, Signature, text_of
from edadm_compile.ir.timesteps import as_timesteps
from edadm_compile.runtime.artifact import Artifact, read
from edadm_compile.runtime.engines import Engine, make_engine
from edadm_compile.runtime.limits import DEFAULT, Limits
from edadm_compile.runtime.running import running
from edadm_compile.runtime.shapes import not_compiled


@dataclass
class UNetOutput:
    """The prediction as ``.sample``, also reachable as ``[0]``, like diffusers' output objects."""

    sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.sample,)[index]


class Config(dict[str, Any]):
    """A configuration with its entries as attributes, like diffusers' own."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the source model's configuration has no {name!r}") from None


class CompiledModel(nn.Module):
    """An integer program with its source model's call signature.

    Args:
        artifact: the loaded file.
        engine: what runs it.
    """

    def __init__(self, artifact: Artifact, engine: Engine) -> None:
        super().__init__()
        self.artifact = artifact
        self.engine = engine
        self._engines: dict[tuple[int, ...], Engine] = {artifact.shapes[0]: engine}
        self._inputs = {
            p.signature.inputs[0].shape: p.signature.inputs
            for p in (artifact.lowered, *(other.lowered for other in artifact.others))
        }

    @property
    def engine_name(self) -> str:
        """What runs the program: "onnxruntime", "reference" or "cuda"."""
        return self.engine.name

    @property
    def signature(self) -> Signature:
        """Inputs and output of the source model, x at the first shape."""
        return self.artifact.lowered.signature

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """[C, H, W] of x for every shape that the file has a program for, the first one first."""
        return self.artifact.shapes

    @property
    def sampler(self) -> SamplerSpec:
        """The sampler the model was compiled for."""
        return self.artifact.lowered.sampler

    @property
    def config(self) -> Config:
        """The source model's configuration, where it had one (diffusers pipelines read sizes from it)."""
        return Config(self.artifact.manifest.get("source", {}).get("config", {}))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs that are not converted."""
        return self.signature.inputs[0].dtype

    @property
    def device(self) -> torch.device:
        """Where predictions come from."""
        return torch.device(getattr(self.engine, "device", "cpu"))

    @property
    def add_embedding(self) -> SimpleNamespace:
        """Width of SDXL's added conditions, where its pipeline looks for it: ``add_embedding.linear_1.in_features``.

        Raises:
            AttributeError: the source model has no added conditions.
        """
        width = self.config.get("projection_class_embeddings_input_dim")
        if width is None:
            raise AttributeError("the source model has no added conditions")
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{s.name} {['B', *s.shape]}".replace("'", "") for s in self.signature.inputs)
        others = f", also {'; '.join(map(text_of, self.shapes[1:]))}" if len(self.shapes) > 1 else ""
        return f"CompiledModel({self.signature.source}, {self._widths()}, {self.engine_name} engine, inputs {inputs}{others})"

    def _widths(self) -> str:
        config = self.artifact.manifest.get("config", {})
        return f"w{config.get('weight_bits')}a{config.get('act_bits')}"

    def _repr_html_(self) -> str:
        """For notebooks: what it is, what runs it, how it is called, how good it is."""
        quality = (self.artifact.manifest.get("quality") or {}).get("sqnr")
        rows = [
            ("source", self.signature.source),
            ("widths", self._widths()),
            ("engine", f"{self.engine_name} on {self.device}"),
            ("inputs", ", ".join(f"{s.name} {['B', *s.shape]}".replace("'", "") for s in self.signature.inputs)),
            *([("shapes", "; ".join(map(text_of, self.shapes)))] if len(self.shapes) > 1 else []),
            ("sampler", f"{self.sampler.scheduler.get('_class_name')}, {self.sampler.steps} steps"),
            ("noise SQNR against float", "not measured" if quality is None else f"{quality:.1f} dB"),
        ]
        return notebook.table("Compiled model", rows)

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predict the noise.

        Args:
            args, kwargs: the source's inputs by position or name: x [B, C, H, W], timestep (number, 0-d or [B]), conditions;
                those in a dictionary (diffusers' ``added_cond_kwargs``) by their names in it.
            return_dict: for models with an output object: return it (True) or a tuple (False).

        Returns:
            What the source returns: a tensor, or an object with ``.sample``; float16 or bfloat16 where x is, so that the
            rest of a pipeline can be of that type.

        Raises:
            InputError: a missing, unknown or wrongly shaped input.
            ArtifactError: the program fails on inputs of the right shapes.
        """
        result = self._run(self._bind(args, kwargs))
        x = args[0] if args else kwargs.get(self.signature.inputs[0].name)
        if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
            result = result.to(x.dtype)
        if self.signature.output == "tensor":
            return result
        return UNetOutput(result) if return_dict else (result,)

    def predict(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """The prediction as a plain tensor, whatever the source returned."""
        return self._run(self._bind((x, t, *conditions), {}))

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        with running("the program cannot run"):
            return self._engine(tuple(inputs[0].shape[1:]))(*inputs)

    def _engine(self, shape: tuple[int, ...]) -> Engine:
        """What runs inputs of a compiled shape; made when the first of that shape come."""
        if shape not in self._engines:
            self._engines[shape] = make_engine(self.engine_name, str(self.device), self.artifact.at(shape))
        return self._engines[shape]

    def _bind(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        specs = self.signature.inputs
        names = [spec.name for spec in specs]
        if len(args) > len(specs):
            raise InputError(f"got {len(args)} positional inputs, the model takes {len(specs)}: {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        for name, value in _flat(kwargs, names):
            if name not in names and value is not None:
                raise InputError(f"input {name!r} was not compiled in; the model takes {', '.join(names)}")
            if name in given:
                raise InputError(f"input {name!r} was given twice")
            given[name] = value
        missing = [n for n in names if given.get(n) is None]
        if missing:
            raise InputError(f"input {missing[0]!r} is missing; the model takes {', '.join(names)}")
        values = {name: _tensor(name, given[name]) for name in names}
        shape = values[names[0]].shape
        if not shape or shape[0] < 1:
            raise InputError(
                f"input {names[0]!r}: got shape {list(shape)}, expected {['B', *specs[0].shape]} with B at least 1"
            )
        specs = self._specs(values[names[0]])
        return [_conform(spec, values[spec.name], shape[0]) for spec in specs]

    def _specs(self, x: Tensor) -> tuple[InputSpec, ...]:
        """The inputs at the shape of x.

        Raises:
            InputError: an image of a shape that was not compiled.
        """
        size, first = tuple(x.shape[1:]), self.shapes[0]
        if size not in self._inputs and len(size) == len(first) == 3 and size[0] == first[0]:
            raise InputError(f"input {self.signature.inputs[0].name!r}: {not_compiled(size, self.shapes)}")
        return self._inputs.get(size, self.signature.inputs)


def _flat(kwargs: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Any]]:
    """Keyword arguments, and the entries of those that are dictionaries of inputs."""
    for name, value in kwargs.items():
        if name not in names and isinstance(value, Mapping):
            yield from ((k if k in names else f"{name}.{k}", v) for k, v in value.items())
        else:
            yield name, value


def _tensor(name: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"input {name!r}: got {type(value).__name__}, expected a tensor") from None


def _conform(spec: InputSpec, value: Tensor, batch: int) -> Tensor:
    assert isinstance(value, Tensor)
    if spec.role == "t" and value.numel() == 1:
        value = value.reshape(1).expand(batch)
    if value.shape != (batch, *spec.shape):
        raise InputError(f"input {spec.name!r}: got shape {list(value.shape)}, expected {[batch, *spec.shape]}")
    result: Tensor = as_timesteps(value, spec.dtype) if spec.role == "t" else value.to(spec.dtype)
    return result.contiguous()


def load(
    path: str | Path,
    device: str = "cpu",
    engine: str | None = None,
    limits: Limits = DEFAULT,
    shape: tuple[int, ...] | None = None,
) -> CompiledModel:
    """Load a ``.qmod`` file.

    Args:
        path: file written by ``edadm-compile``.
        device: "cpu", or "cuda" for the compiled kernels in the file.
        engine: "onnxruntime" (fast) or "reference" (pure torch, defines what is right) on the CPU, or "cuda"; by default
            the first of these that the device has.
        limits: what the file may ask for, such as memory; the defaults are far above any model.
        shape: [C, H, W] of x: only this one of the shapes in the file. By default the model takes all of them, and makes
            what runs a further one when the first input of that shape comes.

    Raises:
        ArtifactError: the file cannot be trusted or understood.
        InputError: unknown device or engine, or a shape that was not compiled.
        TargetError: no GPU here, no code for it in the file, or ONNX Runtime is not installed.
        ExportError: the program has no ONNX form (with ``engine="onnxruntime"``).
    """
    artifact = read(Path(path), limits, device_code=device != "cpu")
    return from_artifact(artifact if shape is None else artifact.at(tuple(shape)), device, engine)


def from_artifact(artifact: Artifact, device: str = "cpu", engine: str | None = None) -> CompiledModel:
    """Wrap a loaded artifact; see `load`."""
    return CompiledModel(artifact, make_engine(engine, device, artifact))
