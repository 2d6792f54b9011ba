"""Rows of docs/families.md: made from shapes alone, and what the committed file says."""

import json
from dataclasses import replace

import pytest

from benchmarks.families.architectures import ARCHITECTURES, build, twin
from benchmarks.families.table import RESULTS, build_empty, row


def test_an_empty_network_has_the_structure_of_a_real_one():
    small = twin(ARCHITECTURES["sd-1.5"])
    real, empty = build(small).state_dict(), build_empty(small).state_dict()
    assert {n: (v.shape, v.dtype) for n, v in empty.items()} == {n: (v.shape, v.dtype) for n, v in real.items()}
    large = [n for n, v in real.items() if v.numel() > 1 << 16]
    assert large and not any(bool(empty[n].any()) for n in large)
    assert all(bool(v.any()) for n, v in empty.items() if n not in large)


def test_a_row_has_every_convolution_and_linear_layer_in_integers():
    full = twin(ARCHITECTURES["dit-xl-2"])
    found = row(replace(full, config={**full.config, "num_layers": 2, "sample_size": 8}), "sm_90")
    assert not {"conv2d", "linear"} & found["kinds"]["float"].keys() and found["kinds"]["float"]["attention"] == 2
    assert found["kinds"]["integer"]["conv2d"] == 1 and found["plan"]["launches"] > 20
    assert found["bytes"]["w4a8"] > 0 and found["memory"]["peak"] > found["bytes"]["fp16"]


@pytest.mark.parametrize("key", json.loads(RESULTS.read_text())["rows"])
def test_committed_rows(key):
    found = json.loads(RESULTS.read_text())["rows"][key]
    assert not {"conv2d", "linear", "conv_transpose2d"} & found["kinds"]["float"].keys()
    assert found["bytes"]["w4a8"] < 0.5 * found["bytes"]["fp16"] and found["blocks"] > 20
