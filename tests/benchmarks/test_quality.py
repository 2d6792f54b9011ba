"""The quality benchmarks: their settings and arithmetic, and a shortened run."""

import dataclasses
import json

import pytest
import torch

from benchmarks.quality import methods, reconstruction, tfmq
from edadm_compile.methods import METHODS
from tests.graphs import TinyUNet, small_config, source_of


def test_every_row_is_a_configuration_of_its_own():
    for table in (methods.METHODS, methods.ABLATIONS):
        recipes = {
            name: (c.recipe, c.uniform, "simulated" in table[name])
            for name in table
            if (c := methods.configuration(table[name], "w4a6", 1, 7, 9))
        }
        assert len(set(recipes.values())) == len(table)
    config = methods.configuration(methods.ABLATIONS["layer losses alone"], "w4a6", 1, 7, 9)
    assert (config.name, config.seed, config.calib_samples, config.reconstruction.iters) == ("w4a6", 1, 9, 7)
    assert (config.recipe.block_loss_weight, config.recipe.layer_loss_weight) == (0.0, 1.0)
    assert {c.get("method", "default") for c in methods.METHODS.values()} == set(METHODS)


def test_means_and_spreads(tmp_path):
    cells = {}
    for seed, value in enumerate((20.0, 21.0, 25.0)):
        cells[f"a w4a8 {seed}"] = {
            "method": "a",
            "width": "w4a8",
            "seed": seed,
            **dict.fromkeys(methods.FIGURES, value),
        }
    cells["b w8a8 0"] = {"method": "b", "width": "w8a8", "seed": 0, **dict.fromkeys(methods.FIGURES, 1.0)}
    first, second = methods.summary({"cells": cells})
    assert (first["method"], first["width"], first["seeds"]) == ("b", "w8a8", 1)  # widths in the table's order
    assert (second["seeds"], second["sqnr_db"], second["sqnr_db_spread"]) == (3, 22.0, 5.0)
    methods.write(tmp_path / "table", {"cells": cells})
    assert (tmp_path / "table.csv").read_text().splitlines()[2].startswith("w4a8,a,3,22.0,5.0")
    methods.plot(tmp_path / "table", {"cells": cells})
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_another_budget_does_not_go_into_the_same_file(tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps({"budget": {"iters": 1}, "cells": {}}))
    with pytest.raises(SystemExit):
        methods.main(["--out", str(tmp_path / "t"), "--only", "ours"])
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        methods.main(["--out", str(tmp_path / "t"), "--only", "theirs"])
    assert "unknown theirs" in capsys.readouterr().err


def test_reconstruction_speed_of_one_unit(tmp_path):
    out = tmp_path / "r.json"
    reconstruction.main(["--units", "1", "--steps", "1", "--samples", "8", "--threads", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    (row,) = found["units"]
    assert row["ours_seconds"] > 0 and row["released_seconds"] > 0
    assert found["ratio"] == pytest.approx(row["released_seconds"] / row["ours_seconds"])


def test_scales_of_each_step_are_those_of_its_own_states():
    """The simulated rival: scales differ from step to step, and a call uses those of its timestep."""
    source = source_of(TinyUNet())
    config = methods.configuration(methods.METHODS["TFMQ-DM (simulated)"], "w4a4", 0, 2, 12)
    config = dataclasses.replace(config, tdac=small_config().tdac)
    model = tfmq.simulate(source, config)
    first, last = model.scales[0], model.scales[-1]
    assert len(model.scales) == model.timesteps.numel() == 4
    assert any(float(a[0]) != float(b[0]) for a, b in zip(first, last, strict=True))
    x, t = torch.randn(4, 3, 8, 8), model.timesteps.long()
    mixed = model(x, t)
    for row in range(4):
        alone = model(x[row : row + 1], t[row : row + 1])
        assert torch.allclose(mixed[row : row + 1], alone, atol=1e-5)
    swapped = tfmq.StepScaled(model.program, model.timesteps, model.scales[::-1])
    assert not torch.allclose(swapped(x, t), mixed, atol=1e-3)
