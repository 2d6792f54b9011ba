"""Calibration samples of the user's own: taken as they are, refused where they do not fit."""

import dataclasses

import pytest
import torch

from edadm_compile import CalibrationSamples
from edadm_compile.calibration.collect import collect
from edadm_compile.driver.compile import to_artifact
from edadm_compile.errors import InputError
from edadm_compile.pipeline import compile_source
from tests.graphs import small_config


def _samples(count=6, **changes):
    generator = torch.Generator().manual_seed(5)
    values = {
        "x": torch.randn(count, 3, 8, 8, generator=generator),
        "t": torch.tensor([75, 50, 25, 0, 26, 74])[:count],
        "conditions": {"label": torch.tensor([0, 1, 2, 3, 4, 0])[:count]},
    }
    return CalibrationSamples(**{**values, **changes})


def test_the_set_is_made_of_the_given_samples(labelled_program):
    given = _samples()
    found = collect(labelled_program, small_config(), torch.Generator().manual_seed(0), given=given)
    assert torch.equal(found.x, given.x) and torch.equal(found.t, given.t)
    assert torch.equal(found.conditions[0], given.conditions["label"])
    times = found.trajectories.t
    assert [float(times[s]) for s in found.step] == [75.0, 50.0, 25.0, 0.0, 25.0, 75.0]
    assert int(found.allocation.counts.sum()) == 6
    assert found.selection()["given"] == found.given and found.selection()["density"] is None


def test_guidance_adds_the_other_branch(labelled_program):
    spec = dataclasses.replace(labelled_program.sampler, guidance=2.0, null=(torch.tensor(4),))
    guided = dataclasses.replace(labelled_program, sampler=spec)
    given = _samples(conditions={"label": torch.tensor([0, 1, 2, 3, 0, 1])})
    found = collect(guided, small_config(), torch.Generator().manual_seed(0), given=given)
    assert found.x.shape[0] == 12 and torch.equal(found.x[0::2], given.x) and torch.equal(found.x[1::2], given.x)
    assert found.conditions[0].tolist() == [4, 0, 4, 1, 4, 2, 4, 3, 4, 0, 4, 1]


def test_a_compilation_uses_them_and_the_file_says_so(labelled_source, compiled):
    config = small_config(attention="int8")
    found = compile_source(labelled_source, config, calibration=_samples(), quality=False)
    manifest = to_artifact(found).manifest
    assert len(manifest["selection"]["given"]) == 64 and sum(manifest["allocation"]) == 6
    assert "given" not in to_artifact(compiled).manifest["selection"]
    ranges = found.stats["calibrate"]["ranges"]
    low, high = next(iter(ranges.values()))
    x = _samples().x
    assert (low, high) == pytest.approx((float(x.min()), float(x.max())))


@pytest.mark.parametrize("changes, said", [
    ({"x": torch.zeros(6, 1, 8, 8)}, r"x has shape \[6, 1, 8, 8\], expected \[6, 3, 8, 8\]"),
    ({"x": torch.zeros(0, 3, 8, 8)}, r"x has shape \[0, 3, 8, 8\], expected \['N', 3, 8, 8\]"),
    ({"x": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, "x is torch.uint8, expected floating point"),
    ({"x": torch.full((6, 3, 8, 8), float("nan"))}, "x holds NaN"),
    ({"x": [1, 2]}, r"x is list, expected a tensor"),
    ({"t": torch.tensor([1, 2])}, r"t has shape \[2\], expected \[6\]"),
    ({"t": torch.tensor([1, 2, 3, 4, 5, -1])}, "t holds -1"),
    ({"t": torch.full((6,), 1.5)}, "timestep: got 1.5, this model takes whole ones"),
    ({"conditions": {}}, r"missing \['label'\]; the model takes conditions \['label'\]"),
    ({"conditions": {"label": torch.zeros(6, dtype=torch.int64), "text": torch.zeros(6)}}, r"unknown \['text'\]"),
    ({"conditions": {"label": torch.full((6,), 5)}}, "labels 5 to 5, allowed 0 to 4"),
    ({"conditions": {"label": torch.zeros(6)}}, "is torch.float32, the model takes torch.int64"),
])  # fmt: skip
def test_what_does_not_fit_is_named(labelled_program, changes, said):
    with pytest.raises(InputError, match=said):
        _samples(**changes).inputs(labelled_program.signature)
