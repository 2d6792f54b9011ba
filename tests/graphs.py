"""Small programs for tests: graphs written by hand, and tiny modules captured by the real front door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from edadm_compile.calibration.collect import collect
from edadm_compile.calibration.dataset import CalibrationSet, Trajectories
from edadm_compile.calibration.tdac import uniform
from edadm_compile.config import QuantConfig
from edadm_compile.frontend import Source, source_from_module
from edadm_compile.ir.analysis import propagate_shapes
from edadm_compile.ir.program import InputSpec, LayerInfo, Program, SamplerSpec, Signature, TimeTables, set_constant
from edadm_compile.passes.base import Context, Pass, run_passes
from edadm_compile.pipeline import capture, float_passes

DDIM = {"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear", "clip_sample": False}


def operator(name: str) -> Any:
    """Any ATen or edadm operator, also those outside the closed table."""
    target: Any = torch.ops
    for part in name.split("."):
        target = getattr(target, part)
    return target


class GraphBuilder:
    """Writes a graph node by node.

    Args:
        x: shape of the noisy sample without its batch.
        conditions: shapes of float conditions by name.
    """

    def __init__(
        self,
        x: tuple[int, ...] = (4, 8, 8),
        t_dtype: torch.dtype = torch.int64,
        seed: int = 0,
        **conditions: tuple[int, ...],
    ) -> None:
        self.root, self.graph = nn.Module(), fx.Graph()
        self.generator = torch.Generator().manual_seed(seed)
        specs = [InputSpec("x", x, torch.float32, "x"), InputSpec("t", (), t_dtype, "t")]
        specs += [InputSpec(name, shape, torch.float32, "cond") for name, shape in conditions.items()]
        self.specs = tuple(specs)
        nodes = [self.graph.placeholder(s.name) for s in specs]
        for node in nodes:
            node.meta["val"] = torch.empty(0)
        self.x, self.t, *self.conditions = nodes

    def op(self, name: str, *args: Any, scope: tuple[str, ...] = (), **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(operator(name), args, kwargs)
        node.meta["scope"] = scope
        return node

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def constant(self, name: str, value: Tensor) -> fx.Node:
        set_constant(self.root, name, value)
        return self.graph.get_attr(name)

    def conv(
        self,
        name: str,
        x: fx.Node,
        inner: int,
        outer: int,
        kernel: int = 3,
        scope: tuple[str, ...] | None = None,
        **meta: Any,
    ) -> fx.Node:
        """A "same" convolution with a bias; annotated as a 4-bit layer."""
        w = self.constant(
            f"{name}.weight", self.random(outer, inner, kernel, kernel, scale=(inner * kernel**2) ** -0.5)
        )
        b = self.constant(f"{name}.bias", self.random(outer, scale=0.1))
        node = self.op(
            "aten.conv2d.default", x, w, b, [1, 1], [kernel // 2] * 2, scope=(name,) if scope is None else scope
        )
        node.meta["layer"] = LayerInfo(name, "conv2d", (outer, inner, kernel, kernel), "inner", 4, 8)
        node.meta.update(meta)
        return node

    def linear(self, name: str, x: fx.Node, inner: int, outer: int, scope: tuple[str, ...] | None = None) -> fx.Node:
        """A linear layer with a bias; annotated as a 4-bit layer."""
        w = self.constant(f"{name}.weight", self.random(outer, inner, scale=inner**-0.5))
        b = self.constant(f"{name}.bias", self.random(outer, scale=0.1))
        node = self.op("aten.linear.default", x, w, b, scope=(name,) if scope is None else scope)
        node.meta["layer"] = LayerInfo(name, "linear", (outer, inner), "inner", 4, 8)
        return node

    def program(
        self,
        output: fx.Node,
        dialect: str = "float",
        *,
        time: TimeTables | None = None,
        steps: int = 4,
        shapes: bool = True,
    ) -> Program:
        self.graph.output(output)
        module = fx.GraphModule(self.root, self.graph)
        signature = Signature(self.specs, "tensor", 1024, 1, "test")
        program = Program(module, dialect, signature, SamplerSpec(DDIM, steps), time)
        if shapes:
            propagate_shapes(program)
        return program


def nodes_of(program: Program, name: str) -> list[fx.Node]:
    """Nodes that call the operator `name`."""
    return [n for n in program.graph_module.graph.nodes if str(n.target) == name]


def count_ops(program: Program) -> dict[str, int]:
    """How often each operator is called."""
    counts: dict[str, int] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function":
            counts[str(node.target)] = counts.get(str(node.target), 0) + 1
    return counts


def inputs_for(program: Program, batch: int = 3, seed: int = 1) -> list[Tensor]:
    """Random inputs that a program accepts; timesteps differ within the batch."""
    generator = torch.Generator().manual_seed(seed)
    values = []
    for spec in program.signature.inputs:
        if spec.role == "t":
            values.append(torch.randint(0, 100, (batch,), generator=generator).to(spec.dtype))
        elif spec.dtype.is_floating_point:
            values.append(torch.randn((batch, *spec.shape), generator=generator, dtype=spec.dtype))
        else:
            values.append(
                torch.randint(0, spec.num_classes or 2, (batch, *spec.shape), generator=generator).to(spec.dtype)
            )
    return values


def assert_close(value: Tensor, reference: Tensor, depth: int = 256) -> None:
    """Element by element within `depth` float32 roundings of the largest magnitude (two orders of one exact computation)."""
    assert value.shape == reference.shape
    tolerance = depth * 2.0**-24 * max(1.0, float(reference.abs().max()))
    worst = float((value.double() - reference.double()).abs().max())
    assert worst <= tolerance, f"differs by {worst:.3e}, allowed {tolerance:.3e}"


def assert_same_function(before: Program, after: Program, depth: int = 256, batch: int = 3) -> None:
    """Two programs compute the same function on a few random batches."""
    for seed in (1, 2):
        inputs = inputs_for(before, batch, seed)
        with torch.no_grad():
            assert_close(after(*inputs), before(*inputs), depth)


def apply(
    program: Program, *passes: Pass, config: QuantConfig | None = None, calibration: Any = None
) -> tuple[Program, Context]:
    """Run passes the way the pipeline does."""
    context = Context(config or QuantConfig(), calibration=calibration)
    return run_passes(program, list(passes), context), context


def captured(module: nn.Module, shape: tuple[int, int, int] = (3, 8, 8), steps: int = 4, **options: Any) -> Program:
    """A module traced to a float program, before any pass."""
    torch.manual_seed(0)
    return capture(source_of(module, shape, steps, **options))


def source_of(module: nn.Module, shape: tuple[int, int, int] = (3, 8, 8), steps: int = 4, **options: Any) -> Source:
    return source_from_module(module, SamplerSpec(DDIM, steps), shape=shape, **options)


def float_program(source: Source, config: QuantConfig | None = None) -> Program:
    """A source through all float passes."""
    return run_passes(capture(source), float_passes(), Context(config or QuantConfig()))


def small_config(**changes: Any) -> QuantConfig:
    """A configuration whose compilation takes a second."""
    from edadm_compile.config import ReconstructionConfig, TdacConfig

    settings: dict[str, Any] = {
        "calib_samples": 12,
        "tdac": TdacConfig(trajectories=3),
        "reconstruction": ReconstructionConfig(iters=8, batch=8),
    }
    return QuantConfig(**{**settings, **changes})


def collected(program: Program, config: QuantConfig) -> Any:
    """A calibration set for a float program."""
    return collect(program, config, Context(config).generator(1))


def random_calibration(program: Program, samples: int = 12, steps: int = 4) -> CalibrationSet:
    """A calibration set of random states, for graphs that are no noise predictors."""
    times = torch.tensor([75.0, 50.0, 25.0, 0.0])[:steps].to(program.signature.inputs[1].dtype)
    batches = [inputs_for(program, 3, seed) for seed in range(steps)]
    x = torch.stack([b[0] for b in batches])
    conditions = tuple(batches[0][2:])
    with torch.no_grad():
        prediction = torch.stack([program(x[i], times[i].expand(3), *conditions) for i in range(steps)])
    values = inputs_for(program, samples, 99)
    step = torch.arange(samples) % steps
    kept = Trajectories(x, prediction, times, conditions)
    return CalibrationSet(values[0], times[step], tuple(values[2:]), step, uniform(steps, samples), kept)


class TinyUNet(nn.Module):
    """Residual blocks, one resolution change, a skip concatenation, attention, a time path and optional labels."""

    def __init__(self, width: int = 8, classes: int | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, width))
        self.label = nn.Embedding(classes, width) if classes else None
        self.label_proj = nn.Linear(width, width) if classes else None
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.block1 = _Residual(width, width)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.block2 = _Residual(width, width)
        self.attention = _Attention(width)
        self.up = nn.ConvTranspose2d(width, width + 2, 4, stride=2, padding=1)
        self.merge = nn.Conv2d(2 * width + 2, width, 1)
        self.block3 = _Residual(width, width)
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        frequencies = torch.exp(torch.arange(4, dtype=torch.float32) * -1.5)
        angles = t.float()[:, None] * frequencies[None]
        emb = self.time(torch.cat((angles.sin(), angles.cos()), dim=1))
        if self.label is not None:
            emb = emb + self.label_proj(self.label(label))
        h = skip = self.block1(self.stem(x), emb)
        h = self.attention(self.block2(self.down(h), emb))
        h = self.merge(torch.cat((self.up(h), skip), dim=1))
        return self.head(torch.nn.functional.silu(self.block3(h, emb)))


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, inner)
        self.conv1, self.conv2 = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        self.emb = nn.Linear(outer, outer)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(torch.nn.functional.silu(self.norm(x)))
        h = h + self.emb(torch.nn.functional.silu(emb))[:, :, None, None]
        return x + self.conv2(torch.nn.functional.silu(h))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        h = torch.nn.functional.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))
        return x + self.out(h).transpose(1, 2).reshape(b, c, height, width)


class Planted(nn.Module):
    """Four equal layers in a row; the weight of `wild` has rare large values, which four bits cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        for name in ("first", "second", "wild", "third"):
            setattr(self, name, nn.Conv2d(8, 8, 3, padding=1))
        with torch.no_grad():
            self.wild.weight *= torch.rand(self.wild.weight.shape).pow(8) * 6

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.stem(x)
        for layer in (self.first, self.second, self.wild, self.third):
            h = h + layer(torch.nn.functional.silu(h))
        return self.head(h)
