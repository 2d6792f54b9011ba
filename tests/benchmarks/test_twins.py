"""The twins' benchmark: one of the transformers, shortened, the whole way."""

from dataclasses import replace

import pytest

from benchmarks.families.architectures import ARCHITECTURES, build, twin
from benchmarks.families.twins import conditions, measure, run

SETTINGS = {"preset": "w4a8", "iters": 1, "calib_samples": 4, "steps": 2}


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_a_twin_has_the_published_structure(key):
    """Same blocks and levels, at most 20 million parameters; conditions fit the network."""
    full = ARCHITECTURES[key]
    small = twin(full)
    same = ("down_block_types", "up_block_types", "layers_per_block", "transformer_layers_per_block", "use_linear_projection", "patch_size",
            "resnet_time_scale_shift", "addition_embed_type", "in_channels", "out_channels")  # fmt: skip
    assert {n: small.config.get(n) for n in same} == {n: full.config.get(n) for n in same}
    assert small.conditions.keys() == full.conditions.keys() and small.labels == full.labels
    if "block_out_channels" in full.config:  # the ratio of the levels too
        first = full.config["block_out_channels"][0], small.config["block_out_channels"][0]
        assert [c / first[0] for c in full.config["block_out_channels"]] == [
            c / first[1] for c in small.config["block_out_channels"]
        ]
    assert sum(p.numel() for p in build(small).parameters()) < 20e6
    rows = conditions(small)
    assert {n: tuple(v.shape[1:]) for n, v in rows.items()} == dict(small.conditions)
    assert twin(full, 2).config != small.config


def test_a_shortened_dit_goes_the_whole_way(tmp_path):
    """Its first timestep embedding is used twice: two names of one tensor go into the file."""
    full = twin(ARCHITECTURES["dit-xl-2"])
    row = run(replace(full, config={**full.config, "num_layers": 2, "sample_size": 8}), tmp_path, SETTINGS)
    assert row["verify"]["broken"] == [] and row["onnx"]["broken"] == []
    assert (
        row["onnx"]["integer"]["linear"] == row["verify"]["integer_layers"] - 1 and row["onnx"]["float"]["linear"] == 0
    )
    assert row["onnx"]["integer"]["conv2d"] == 1
    assert row["verify"]["sqnr_db"]["integer_vs_float"] > 15


def test_a_family_that_fails_is_in_the_file(tmp_path, monkeypatch):
    from edadm_compile.errors import ContractError

    def broken(*_):
        raise ContractError("something")

    monkeypatch.setattr("benchmarks.families.twins.run", broken)
    (tmp_path / "t.json").write_text('{"rows": {"sdxl": {"kept": 1}}}')
    assert measure(["sd-1.5"], SETTINGS, tmp_path / "t.json") == 1
    text = (tmp_path / "t.json").read_text()
    assert "ContractError: something" in text and '"kept": 1' in text
