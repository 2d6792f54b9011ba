"""Rows of the time tables that the graph computes, against those of the program, for every kind of timestep."""

from __future__ import annotations

import dataclasses
import functools

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edadm_compile.config import QuantConfig
from edadm_compile.export.convert import convert
from edadm_compile.export.targets import target
from edadm_compile.frontend import source_from_module
from edadm_compile.ir.program import Program, SamplerSpec, TimeTables, placeholders
from edadm_compile.pipeline import compile_source
from tests.export.onnx_graphs import session
from tests.graphs import TinyUNet, source_of
from tests.lowering.plans import QUICK
from tests.models.variants import make

#: Of the largest value of a row; 2.1e-7 was measured. Rows of neighbouring timesteps differ by more than a hundredth.
ROUNDING = 1e-6


class NoiseLevel(nn.Module):
    """Takes the noise level as a float: its linear layer refuses integers."""

    def __init__(self):
        super().__init__()
        self.level, self.stem = nn.Linear(1, 8), nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 3, padding=1)
        with torch.no_grad():
            self.level.weight /= 10

    def forward(self, x, t):
        return self.head(torch.tanh(self.stem(x)) + torch.sin(self.level(t[:, None]))[:, :, None, None])


class Timeless(nn.Module):
    """Does not look at the timestep; only the mean correction depends on it."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        return self.head(torch.tanh(self.stem(x)))


@functools.cache
def program(name: str) -> Program:
    torch.manual_seed(0)
    if name == "float":  # 7 steps from 99 down to 0: every other one is no whole number
        scheduler = {
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 100,
            "timestep_spacing": "linspace",
        }
        source = source_from_module(NoiseLevel().eval(), SamplerSpec(scheduler, 7), shape=(3, 8, 8))
    elif name == "timeless":
        source = source_of(Timeless().eval(), steps=4)
    elif name == "one step":
        source = source_of(make("scale_shift"), steps=1)
    elif name == "all":
        source = source_of(make("scale_shift"), steps=4)
        schedule = {**source.sampler.scheduler, "num_train_timesteps": 6}
        source = dataclasses.replace(source, sampler=SamplerSpec(schedule, 4))
    elif name == "labels":
        source = source_of(TinyUNet(classes=5), steps=4, num_classes={"label": 5})
    else:
        source = source_of(make(name), steps=4)
    config = QuantConfig(4, 8, **{**QUICK, "method": "default"})
    found = compile_source(source, config, quality=False).qdq
    # On random networks the mean correction is next to nothing: rows of its own tell them apart.
    assert found.time is not None and "time_correction" in found.time.tables
    rows = torch.randn(found.time.tables["time_correction"].shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(
        found, time=dataclasses.replace(found.time, tables={**found.time.tables, "time_correction": rows})
    )


def time_of(name: str) -> TimeTables:
    time = program(name).time
    assert time is not None
    return time


@functools.cache
def graph(name: str, scalar: bool = False) -> tuple[object, list[str]]:
    """A session whose outputs include the rows, and the names of these."""
    written = convert(program(name), target("cpu"), scalar_time=scalar)
    prepared = written.prepared
    names = placeholders(prepared.graph_module.graph)[len(prepared.signature.inputs) :]
    values = {value.name: value for node in written.model.graph for value in node.outputs}
    for row in names:
        values[row].type = ir.TensorType(ir.DataType.FLOAT)
        written.model.graph.outputs.append(values[row])
    return session(ir.to_proto(written.model)), names


def rows(name: str, t: Tensor, batch: int, scalar: bool = False) -> dict[str, Tensor]:
    """What the graph has for timesteps `t`, with `batch` images of zeros."""
    ready, names = graph(name, scalar)
    feeds = {}
    for given, spec in zip(ready.get_inputs(), program(name).signature.inputs, strict=True):
        value = t if spec.role == "t" else torch.zeros((batch, *spec.shape), dtype=spec.dtype)
        feeds[given.name] = value.numpy()
    return {n: torch.from_numpy(v) for n, v in zip(names, ready.run(names, feeds), strict=True)}


def assert_rows(found: dict[str, Tensor], wanted: dict[str, Tensor], share: float = ROUNDING) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=share * float(value.abs().max()))


WHOLE = {
    "known": [0, 25, 50, 75], "first": [75, 75], "last": [0], "others": [1, 37, 74, 26], "one other": [75, 50, 49, 0],
    "other first": [88, 75], "between the last two": [60], "beyond the first step": [99, 76, 500],
    "before the last step": [-1, -40],
}  # fmt: skip


@pytest.mark.parametrize("times", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("name", ["scale_shift", "labels", "time_plane", "timeless"])
def test_whole_timesteps_have_the_rows_of_the_program(name, times):
    assert time_of(name).keys.tolist() == [0, 25, 50, 75]
    t = torch.tensor(times)
    known = set(times) <= {0, 25, 50, 75}
    assert_rows(rows(name, t, len(times)), time_of(name).lookup(t), 0.0 if known else ROUNDING)


def test_rows_of_timesteps_nearby_differ_by_far_more_than_is_allowed():
    for name in ("scale_shift", "labels", "time_plane", "timeless"):
        tables = [time_of(name).lookup(torch.tensor([t])) for t in (75, 74)]
        assert all(
            float((a - b).abs().max()) > 1e-3 * float(a.abs().max())
            for a, b in zip(*(t.values() for t in tables), strict=True)
        )


FLOATS = {
    "known": [0.0, 16.5, 33.0, 49.5, 82.5], "first and last": [99.0, 0.0], "others": [16.25, 1e-3, 98.9999],
    "next to known": [16.500002, 49.499996], "one other": [99.0, 33.0, 50.0], "beyond": [99.5, 1e4], "before": [-0.5],
}  # fmt: skip


@pytest.mark.parametrize("times", FLOATS.values(), ids=FLOATS.keys())
def test_fractional_timesteps_have_the_rows_of_the_program(times):
    assert program("float").signature.inputs[1].dtype == torch.float32
    assert time_of("float").keys.tolist() == [0, 16.5, 33, 49.5, 66, 82.5, 99]
    t = torch.tensor(times)
    known = set(times) <= set(time_of("float").keys.tolist())
    # sin(level) loses digits for large arguments, the same in both: an ulp of 1e4 * 0.1 is 6e-5
    share = 0.0 if known else 2e-4 if max(times) > 1e3 else ROUNDING
    assert_rows(rows("float", t, len(times)), time_of("float").lookup(t), share)


@pytest.mark.parametrize("t", [50, 41, 99])
@pytest.mark.parametrize("name", ["scale_shift", "labels"])
def test_one_timestep_serves_any_number_of_images(name, t):
    wanted = time_of(name).lookup(torch.tensor([t]))
    for batch in (1, 3):
        repeated = {k: v.expand(batch, *v.shape[1:]) for k, v in wanted.items()}
        one = rows(name, torch.tensor([t]), batch)
        assert_rows(one, repeated)
        assert_rows(rows(name, torch.tensor(t), batch, scalar=True), one, 0.0)
        assert_rows(rows(name, torch.full((batch,), t), batch), one, 0.0)


@pytest.mark.parametrize("times", [[0, 0], [50], [99, 0, -3]])
def test_a_single_step_has_one_row_for_all_corrections(times):
    assert time_of("one step").keys.tolist() == [0]
    t = torch.tensor(times)
    found = rows("one step", t, len(times))
    assert_rows(found, time_of("one step").lookup(t), 0.0 if set(times) == {0} else ROUNDING)
    assert torch.equal(found["time_correction"], time_of("one step").tables["time_correction"].expand(len(times), -1))


def test_tables_of_all_timesteps_are_indexed():
    time = time_of("all")
    assert time.path is None and time.keys.tolist() == [0, 1, 2, 3, 4, 5]
    for times in ([0, 5], [3], [1, 2, 4, 0]):
        assert_rows(rows("all", torch.tensor(times), len(times)), time.lookup(torch.tensor(times)), 0.0)


def test_a_fixed_batch_has_rows_too():
    time = time_of("len_of_batch")
    for times in ([75, 25], [75, 24], [1, 2]):
        t = torch.tensor(times)
        assert_rows(rows("len_of_batch", t, 2), time.lookup(t), ROUNDING)
    known = rows("len_of_batch", torch.tensor([25]), 2)
    assert_rows(known, time.lookup(torch.tensor([25, 25])), 0.0)


def test_a_network_without_tables_takes_timesteps_all_the_same():
    found = compile_source(source_of(Timeless().eval(), steps=2), QuantConfig(8, 8, **QUICK), quality=False).qdq
    assert found.time is None
    ready = session(ir.to_proto(convert(found, target("cpu")).model))
    assert [(i.name, i.shape) for i in ready.get_inputs()] == [("x", ["batch", 3, 8, 8]), ("t", ["steps"])]
    x = torch.randn(2, 3, 8, 8).numpy()
    first, second = (ready.run(None, {"x": x, "t": torch.tensor(t).numpy()})[0] for t in ([3], [50, 7]))
    assert (first == second).all()
