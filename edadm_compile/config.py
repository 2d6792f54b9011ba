"""Settings of a compilation: one frozen value, to and from TOML and JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm_compile import notebook
from edadm_compile.errors import ConfigError, did_you_mean
from edadm_compile.methods import METHODS, RANGES, SELECTIONS, Method
from edadm_compile.quant.spec import ACT_BITS, WEIGHT_BITS
from edadm_compile.texts import read_text

#: Named widths: weight bits, activation bits.
PRESETS = {"w8a8": (8, 8), "w6a6": (6, 6), "w4a8": (4, 8), "w4a6": (4, 6), "w4a4": (4, 4)}


@dataclass(frozen=True)
class LayerRule:
    """Widths for the layers whose name matches a shell pattern; the last matching rule wins.

    Attributes:
        pattern: such as ``up_blocks.*.conv1``.
        weight_bits, act_bits: widths, or 32 for "leave in float"; None keeps the default.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None

    def matches(self, name: str) -> bool:
        """Whether the rule applies to the layer called `name`."""
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class TdacConfig:
    """Time-step density and diversity aware calibration (arXiv 2401.04585).

    Attributes:
        diversity_weight: lambda, weight of the diversity score.
        radius_quantile: density radius as a quantile of all pairwise distances.
        radius: absolute radius, overrides the quantile.
        min_per_step: samples every step gets at least.
        trajectories: float trajectories used for scoring.
    """

    diversity_weight: float = 1.2
    radius_quantile: float = 0.5
    radius: float | None = None
    min_per_step: int = 1
    trajectories: int = 32

    def __repr__(self) -> str:
        """What differs from the defaults."""
        return f"TdacConfig({', '.join(f'{name}={value!r}' for name, value in _changed(self).items())})"


@dataclass(frozen=True)
class ReconstructionConfig:
    """Fine-grained block reconstruction. What is None is up to the method (`edadm_compile.methods`).

    Attributes:
        iters: optimizer steps per block; 0 keeps round-to-nearest.
        batch: samples per step.
        lr_weight: Adam learning rate of the rounding variables.
        lr_scale: Adam learning rate of log(activation scale).
        block_loss_weight: weight of the loss of a block's output (0: layer losses only).
        layer_loss_weight: weight of the losses of the layers inside (0: block loss only).
        local_layer_losses: whether the loss of an inner layer trains that layer's roundings alone.
        qdrop: probability that an activation element stays unquantized while training.
        rounding_weight: weight of AdaRound's 0/1 regulariser, annealed from b = 20 to 2 (0: off).
        max_layers: largest number of layers in one block.
        target_dtype: type that the float model's values inside a block are cached in: "float32", or "bfloat16" for half
            the memory.
    """

    iters: int = 200
    batch: int = 32
    lr_weight: float = 5e-2
    lr_scale: float = 2e-3
    block_loss_weight: float | None = None
    layer_loss_weight: float | None = None
    local_layer_losses: bool | None = None
    qdrop: float | None = None
    rounding_weight: float | None = None
    max_layers: int = 8
    target_dtype: str = "float32"

    def __repr__(self) -> str:
        """What differs from the defaults."""
        return f"ReconstructionConfig({', '.join(f'{name}={value!r}' for name, value in _changed(self).items())})"


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides the result, besides the model. What is None is up to the method.

    Attributes:
        weight_bits, act_bits: requested widths of the inner layers.
        method: a name in `edadm_compile.methods.METHODS`.
        uniform: strict widths: no 16-bit stem input, no promoted layers (first and last layer stay 8-bit).
        promoted_share: largest share of the parameters in 8-bit layers of a narrower model; 0.15 keeps a W4 model at
            4.6 bits on average.
        budget_bits: choose 8-bit layers by integer programming: least predicted error with at most so many stored bits
            per weight on average (see `edadm_compile.passes.mixed_widths`); None keeps the promotion rule.
        min_sqnr: the same: fewest stored bits with at least so many dB of predicted noise SQNR; None: no such bound.
        attention: "float" or "int8" for the two attention matrix products.
        deploy: "onnxruntime" makes the program that engine runs best: convolutions get quantized outputs, which
            reconstruction takes part in, and single-head attention is folded; None for no engine in particular.
        selection: how calibration samples are spread over the sampler's steps: "tdac", or by density or diversity
            alone, evenly ("uniform"), or by a normal distribution.
        ranges: how scales are found: "mse", "l2.4" (least mean |error|^2.4), "minmax".
        symmetric: activation codes with zero in the middle.
        split: layers that read a concatenation get one scale for each source.
        mean_correction: add the per-step mean error back to the predicted noise.
        calib_samples: calibration samples.
        seed: seeds every random draw.
        tdac, reconstruction: settings of the two halves of the method.
        rules: per-layer overrides.
    """

    weight_bits: int = 4
    act_bits: int = 8
    method: str = "default"
    uniform: bool = False
    promoted_share: float = 0.15
    budget_bits: float | None = None
    min_sqnr: float | None = None
    attention: str = "float"
    deploy: str | None = None
    selection: str | None = None
    ranges: str | None = None
    symmetric: bool | None = None
    split: bool | None = None
    mean_correction: bool | None = None
    calib_samples: int = 512
    seed: int = 0
    tdac: TdacConfig = TdacConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    rules: tuple[LayerRule, ...] = ()

    def __post_init__(self) -> None:
        """Reject values outside their range.

        Raises:
            ConfigError: naming the setting, what was given and what is allowed.
        """
        _one_of("weight_bits", self.weight_bits, WEIGHT_BITS)
        _one_of("act_bits", self.act_bits, ACT_BITS)
        _one_of("method", self.method, tuple(METHODS))
        _one_of("selection", self.selection, (*SELECTIONS, None))
        _one_of("ranges", self.ranges, (*RANGES, None))
        _one_of("attention", self.attention, ("float", "int8"))
        _one_of("deploy", self.deploy, (None, "onnxruntime"))
        _at_least("calib_samples", self.calib_samples, 1)
        _at_least("seed", self.seed, 0)
        _at_least("reconstruction.iters", self.reconstruction.iters, 0)
        _at_least("reconstruction.batch", self.reconstruction.batch, 1)
        _at_least("reconstruction.max_layers", self.reconstruction.max_layers, 1)
        _one_of("reconstruction.target_dtype", self.reconstruction.target_dtype, ("float32", "bfloat16"))
        for name in ("lr_weight", "lr_scale", "block_loss_weight", "layer_loss_weight", "rounding_weight"):
            _at_least(f"reconstruction.{name}", getattr(self.reconstruction, name) or 0.0, 0)
        if self.recipe.phases and not self.recipe.block_loss_weight and not self.recipe.layer_loss_weight:
            raise ConfigError("reconstruction: block_loss_weight and layer_loss_weight are both 0: nothing to minimise")
        _at_least("tdac.trajectories", self.tdac.trajectories, 1)
        _at_least("tdac.diversity_weight", self.tdac.diversity_weight, 0)
        _at_least("tdac.min_per_step", self.tdac.min_per_step, 0)
        if self.tdac.radius is not None:
            _at_least("tdac.radius", self.tdac.radius, 0)
        _in_range("reconstruction.qdrop", self.reconstruction.qdrop or 0.0, 0.0, 1.0)
        _in_range("tdac.radius_quantile", self.tdac.radius_quantile, 0.0, 1.0)
        _in_range("promoted_share", self.promoted_share, 0.0, 1.0)
        self._check_automatic()
        for rule in self.rules:
            _one_of(f"rule {rule.pattern!r} weight_bits", rule.weight_bits, (*WEIGHT_BITS, 32, None))
            _one_of(f"rule {rule.pattern!r} act_bits", rule.act_bits, (*ACT_BITS, 32, None))

    def _check_automatic(self) -> None:
        if not self.is_automatic:
            return
        setting = "budget_bits" if self.budget_bits is not None else "min_sqnr"
        if self.budget_bits is not None and self.min_sqnr is not None:
            raise ConfigError(
                f"budget_bits = {self.budget_bits} and min_sqnr = {self.min_sqnr} exclude each other: one fixes the "
                "size, the other the quality; give one of them"
            )
        if self.uniform or not self.recipe.edges:
            other = "uniform" if self.uniform else f'method = "{self.method}"'
            raise ConfigError(
                f"{setting} and {other} exclude each other: strict widths leave nothing to choose; drop one of them"
            )
        if self.weight_bits > 4:
            raise ConfigError(
                f"weight_bits: got {self.weight_bits} together with {setting}, which chooses between this width and 8 "
                "bits; weights of 5 to 8 bits are all stored in 8, so give weight_bits of at most 4"
            )
        if self.budget_bits is not None:
            _in_range("budget_bits (weights are stored in 4 or 8 bits)", self.budget_bits, 4.0, 8.0)
        if self.min_sqnr is not None:
            _in_range("min_sqnr (dB)", self.min_sqnr, 0.0, 120.0)

    @property
    def is_automatic(self) -> bool:
        """Whether widths are chosen by integer programming."""
        return self.budget_bits is not None or self.min_sqnr is not None

    @property
    def name(self) -> str:
        """Short name such as "w4a8"."""
        return f"w{self.weight_bits}a{self.act_bits}"

    @property
    def recipe(self) -> Method:
        """The method with the settings that were given in place of its own."""
        given = {
            name: value
            for source in (self, self.reconstruction)
            for name in _OVERRIDES
            if (value := getattr(source, name, None)) is not None
        }
        return dataclasses.replace(METHODS[self.method], **given)

    def __repr__(self) -> str:
        """What differs from the defaults, as an expression that makes the same settings; the two widths always."""
        shown = {"weight_bits": self.weight_bits, "act_bits": self.act_bits, **_changed(self)}
        return f"QuantConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def _repr_html_(self) -> str:
        """For notebooks: the widths, the method, and what differs from the defaults."""
        rows = {"weight_bits": self.weight_bits, "act_bits": self.act_bits, "method": self.method, **_changed(self)}
        for name in ("tdac", "reconstruction"):
            if name in rows:
                rows |= {f"{name}.{key}": value for key, value in _changed(rows.pop(name)).items()}
        return notebook.table(f"Settings {self.name}", [(name, str(value)) for name, value in rows.items()])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form; `from_dict` inverts it."""
        return dataclasses.asdict(self)


def _changed(settings: Any) -> dict[str, Any]:
    """Fields of a dataclass that have another value than by default."""
    defaults = type(settings)()
    names = [f.name for f in dataclasses.fields(settings)]
    return {name: value for name in names if (value := getattr(settings, name)) != getattr(defaults, name)}


#: Settings that take the place of a method's own.
_OVERRIDES = (
    "selection", "ranges", "symmetric", "split", "mean_correction", "block_loss_weight", "layer_loss_weight", "qdrop",
    "local_layer_losses", "rounding_weight",
)  # fmt: skip


def from_dict(values: dict[str, Any], where: str = "configuration") -> QuantConfig:
    """Build a configuration from nested plain values.

    Raises:
        ConfigError: unknown or badly typed setting.
    """
    values = dict(values)
    tdac = _build(TdacConfig, values.pop("tdac", {}), f"{where}: [tdac]")
    recon = _build(ReconstructionConfig, values.pop("reconstruction", {}), f"{where}: [reconstruction]")
    listed = values.pop("rules", ())
    if not isinstance(listed, (list, tuple)):
        raise ConfigError(f"{where}: rules must be a list of tables ([[rules]]), got {listed!r}")
    rules = tuple(_build(LayerRule, rule, f"{where}: [[rules]]") for rule in listed)
    config: QuantConfig = _build(QuantConfig, values, where, tdac=tdac, reconstruction=recon, rules=rules)
    return config


def load_config(path: Path) -> dict[str, Any]:
    """Read a TOML or JSON settings file into nested plain values.

    Raises:
        ConfigError: unreadable or malformed file.
    """
    try:
        text = read_text(path)
        return dict(json.loads(text)) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or (error if isinstance(error, OSError) else "it is not text")
        raise ConfigError(f"cannot read settings file {path}: {reason}") from None
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"settings file {path} is not valid {path.suffix.lstrip('.') or 'TOML'}: {error}") from None


def _build(cls: type[Any], values: Any, where: str, **extra: Any) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a table of settings, got {values!r}")
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in types:
            hint = did_you_mean(key, types) or f"; known are {', '.join(sorted(types))}"
            raise ConfigError(f"{where}: unknown setting {key!r}{hint}")
        if not _fits(value, types[key]):
            raise ConfigError(f"{where}: {key} must be {types[key]}, got {value!r}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if needed:
        raise ConfigError(f"{where}: {needed[0]} is missing")
    return cls(**values, **extra)


def _fits(value: Any, annotation: str) -> bool:
    if value is None:
        return "None" in annotation
    if isinstance(value, bool):
        return annotation.startswith("bool")
    if isinstance(value, int):
        return annotation.startswith(("int", "float"))
    return annotation.startswith({float: "float", str: "str"}.get(type(value), "?"))


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        near = did_you_mean(str(value), [a for a in allowed if isinstance(a, str)])
        raise ConfigError(f"{name}: got {value!r}, allowed {', '.join(str(a) for a in allowed if a is not None)}{near}")


def _at_least(name: str, value: float, lowest: int) -> None:
    if not lowest <= value < float("inf"):
        raise ConfigError(f"{name}: got {value}, must be at least {lowest}")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name}: got {value}, must be between {low} and {high}")
