"""Graphs that compute something else than the program, as mistakes in the exporter would make them: none is written."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
import torch

from edadm_compile.driver import export
from edadm_compile.errors import ContractError
from edadm_compile.export import time
from edadm_compile.export.builder import Builder
from edadm_compile.export.operators import FLOAT_TABLE, codes, layers
from tests.exported_files import unharmed


def doubled_scale(patch):
    right = layers.weight
    patch.setattr(layers, "weight", lambda s, n, c, scale, *a: right(s, n, c, scale * (1 + (n == "block2.conv1")), *a))


def shifted_zero_points(patch):
    right = codes.affine
    patch.setattr(codes, "affine", lambda s, node, scale, zero: right(s, node, scale, zero + 1))


def shifted_padding(patch):
    right = codes.zero_code
    patch.setattr(codes, "zero_code", lambda s, n: s.const(right(s, n).const_value.numpy() + 1, torch.uint8))
    patch.setattr(layers, "zero_code", codes.zero_code)


def shifted_kernels(patch):
    right = layers.transposed_settings

    def wrong(*args):
        top, bottom, left, right_ = right(*args)
        return top + 1, bottom - 1, left, right_

    patch.setattr(layers, "transposed_settings", wrong)


def forgotten_ranges(patch):
    patch.setattr(layers, "output_channels", lambda s, node, scale, bias: (scale, bias))


def wrong_terms(patch):
    patch.setattr(codes, "term_scales", lambda scale, terms: [scale * 255, scale][2 - terms :])


def turned_taps(patch):
    right = layers.weight_codes

    def wrong(module, node):
        found, scale, bits = right(module, node)
        return (found.transpose(-1, -2) if found.dim() == 4 else found), scale, bits

    patch.setattr(layers, "weight_codes", wrong)


def negative_bias(patch):
    right = layers._bias
    patch.setattr(layers, "_bias", lambda s, name, bias, scale: right(s, name, -bias, scale))


LAYERS = [doubled_scale, shifted_zero_points, shifted_padding, shifted_kernels, forgotten_ranges, wrong_terms,
          turned_taps, negative_bias]  # fmt: skip


@pytest.mark.parametrize("sabotage", LAYERS, ids=lambda f: f.__name__)
def test_a_wrong_layer_is_not_written(path, old, monkeypatch, sabotage):
    sabotage(monkeypatch)
    with pytest.raises(ContractError, match=r"something else than the reference engine in \d+ place\(s\): layer "):
        export.run(path, old)
    monkeypatch.undo()
    assert unharmed(old)


def test_wrong_int4_constants_are_not_written(path, old, monkeypatch):
    right = Builder.packed_int4
    monkeypatch.setattr(Builder, "packed_int4", lambda self, found, name: right(self, (found - 1).clamp(min=-8), name))
    with pytest.raises(ContractError, match="layer "):
        export.run(path, old, int4=True)
    assert unharmed(old)


def wrong_activation(patch):
    patch.setitem(FLOAT_TABLE, "aten.silu.default", FLOAT_TABLE["aten.relu.default"])


def wrong_norm(patch):
    right = FLOAT_TABLE["aten.group_norm.default"]
    patch.setitem(FLOAT_TABLE, "aten.group_norm.default", lambda s, n: s.op("Mul", right(s, n), s.const(1.3)))


def wrong_rows(patch):
    def rolled(program):
        tables = {name: rows.roll(1, 0) for name, rows in program.time.tables.items()}
        return dataclasses.replace(program, time=dataclasses.replace(program.time, tables=tables))

    right = time.table_rows
    patch.setattr(time, "table_rows", lambda b, program, *a: right(b, rolled(program), *a))


def wrong_path(patch):
    right = time._computed
    patch.setattr(time, "_computed", lambda b, *a: b.op("Mul", right(b, *a), b.constant(1.02)))


BETWEEN = [wrong_activation, wrong_norm, wrong_rows]


@pytest.mark.parametrize("sabotage", BETWEEN, ids=lambda f: f.__name__)
def test_a_wrong_operator_between_layers_is_not_written(path, old, monkeypatch, sabotage):
    sabotage(monkeypatch)
    with pytest.raises(ContractError, match="something else than the reference engine"):
        export.run(path, old)
    assert unharmed(old)


@pytest.mark.parametrize("sabotage", BETWEEN, ids=lambda f: f.__name__)
def test_nor_for_a_consumer_whose_layers_have_no_integer_twin(path, old, monkeypatch, sabotage):
    sabotage(monkeypatch)
    with pytest.raises(ContractError, match=r"layer \S+: .*input codes .* (are|is) allowed"):
        export.run(path, old, onnx_target="tensorrt")
    assert unharmed(old)


def test_a_wrong_layer_is_not_written_for_such_a_consumer(path, old, monkeypatch):
    doubled_scale(monkeypatch)
    with pytest.raises(ContractError, match=r"1 place\(s\): layer block2.conv1: the output differs by .* is allowed"):
        export.run(path, old, onnx_target="tensorrt")
    assert unharmed(old)


def test_a_wrong_row_of_a_timestep_between_those_of_the_sampler_is_not_written(path, old, monkeypatch):
    wrong_path(monkeypatch)
    with pytest.raises(ContractError, match=r"layer \S+ at timestep \d+: .*input codes"):
        export.run(path, old)
    assert unharmed(old)


def test_without_a_check_a_wrong_layer_is_written(path, old, monkeypatch):
    doubled_scale(monkeypatch)
    assert export.run(path, old, check=False)["check"] is None
    onnx.checker.check_model(str(old), full_check=True)
