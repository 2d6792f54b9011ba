import dataclasses
import json
import math
from pathlib import Path

import pytest

from edadm_compile.config import LayerRule, QuantConfig, ReconstructionConfig, TdacConfig, from_dict, load_config
from edadm_compile.driver.compile import make_config
from edadm_compile.driver.options import parse_shape
from edadm_compile.errors import ConfigError, InputError
from edadm_compile.methods import METHODS

_TOML = """
weight_bits = 8
seed = 7
promoted_share = 1
[tdac]
diversity_weight = 2
radius = 0.5
[reconstruction]
iters = 11
[[rules]]
pattern = "up.*"
weight_bits = 8
[[rules]]
pattern = "*.conv1"
act_bits = 32
"""


def _loaded(path: Path, text: str) -> QuantConfig:
    path.write_text(text)
    return from_dict(load_config(path), path.name)


def test_toml_and_json_say_the_same(tmp_path):
    config = _loaded(tmp_path / "a.toml", _TOML)
    assert config == QuantConfig(
        weight_bits=8,
        seed=7,
        promoted_share=1,
        tdac=TdacConfig(diversity_weight=2, radius=0.5),
        reconstruction=ReconstructionConfig(iters=11),
        rules=(LayerRule("up.*", weight_bits=8), LayerRule("*.conv1", act_bits=32)),
    )
    assert _loaded(tmp_path / "a.json", json.dumps(config.to_dict())) == config


def test_a_configuration_survives_its_dictionary():
    for config in (QuantConfig(), QuantConfig(method="minmax", act_bits=16, rules=(LayerRule("*"),))):
        assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_engine_a_program_is_for_comes_from_the_file_or_the_command_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("deploy = 'onnxruntime'")
    assert make_config({}, path).deploy == make_config({"deploy": "onnxruntime"}, None).deploy == "onnxruntime"
    assert make_config({"deploy": None}, path).deploy == "onnxruntime" and make_config({}, None).deploy is None
    with pytest.raises(ConfigError, match="deploy: got 'cuda', allowed onnxruntime"):
        make_config({"deploy": "cuda"}, path)
    for config in (QuantConfig(), QuantConfig(deploy="onnxruntime")):
        assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_names():
    assert QuantConfig().name == "w4a8" and QuantConfig(8, 16).name == "w8a16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_bit = 4", "unknown setting 'weight_bit'; did you mean 'weight_bits'"),
        ("[tdac]\nradius_quantil = 1.0", r"\[tdac\].*did you mean 'radius_quantile'"),
        ("[reconstruction]\niter = 1", r"\[reconstruction\].*did you mean 'iters'"),
        ("[[rules]]\npatern = 'x'", r"\[\[rules\]\].*did you mean 'pattern'"),
        ("zzz = 1", "unknown setting 'zzz'; known are"),
        ("weight_bits = '4'", "weight_bits must be int, got '4'"),
        ("weight_bits = 4.0", "weight_bits must be int"),
        ("weight_bits = true", "weight_bits must be int"),
        ("uniform = 1", "uniform must be bool"),
        ("seed = [1]", "seed must be int"),
        ("deploy = 'onnx'", "deploy: got 'onnx', allowed onnxruntime"),
        ("deploy = false", "deploy must be str"),
        ("tdac = 3", r"\[tdac\]: expected a table"),
        ("rules = 3", "rules must be a list"),
        ("[rules]\npattern = 'x'", "rules must be a list"),
        ("[[rules]]\nweight_bits = 8", "pattern is missing"),
        ("weight_bits = ", "is not valid toml"),
    ],
)
def test_bad_files_are_explained(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        _loaded(tmp_path / "bad.toml", text)


def test_unreadable_files_are_explained(tmp_path):
    with pytest.raises(ConfigError, match="cannot read settings file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read settings file"):
        load_config(tmp_path / "binary.toml")
    for text in ("{", "[1, 2]", "3"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match="is not valid json"):
            load_config(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 1}, "weight_bits: got 1, allowed 2, 3, 4, 5, 6, 7, 8"),
        ({"weight_bits": 16}, "weight_bits"),
        ({"act_bits": 9}, "act_bits: got 9, allowed 2, 3, 4, 5, 6, 7, 8, 16"),
        ({"method": "magic"}, "method: got 'magic', allowed default, eda-dm, q-diffusion, tfmq-dm, ptq4dm, minmax"),
        ({"selection": "best"}, "selection: got 'best', allowed tdac, density, diversity, uniform, normal$"),
        ({"ranges": "max"}, "ranges: got 'max', allowed mse, l2.4, minmax; did you mean 'minmax'"),
        ({"reconstruction": ReconstructionConfig(block_loss_weight=0, layer_loss_weight=0)}, "nothing to minimise"),
        ({"attention": "int4"}, "attention"),
        ({"deploy": "tensorrt"}, "deploy: got 'tensorrt', allowed onnxruntime$"),
        ({"deploy": ""}, "deploy: got '', allowed onnxruntime"),
        ({"deploy": True}, "deploy: got True"),
        ({"calib_samples": 0}, "calib_samples: got 0, must be at least 1"),
        ({"seed": -1}, "seed"),
        ({"promoted_share": 1.5}, "promoted_share: got 1.5, must be between 0.0 and 1.0"),
        ({"promoted_share": math.nan}, "promoted_share"),
        ({"reconstruction": ReconstructionConfig(iters=-1)}, "reconstruction.iters"),
        ({"reconstruction": ReconstructionConfig(batch=0)}, "reconstruction.batch"),
        ({"reconstruction": ReconstructionConfig(max_layers=0)}, "reconstruction.max_layers"),
        ({"reconstruction": ReconstructionConfig(qdrop=1.1)}, "reconstruction.qdrop"),
        ({"reconstruction": ReconstructionConfig(lr_weight=-0.1)}, "reconstruction.lr_weight"),
        ({"reconstruction": ReconstructionConfig(lr_scale=math.nan)}, "reconstruction.lr_scale"),
        ({"reconstruction": ReconstructionConfig(layer_loss_weight=-1)}, "reconstruction.layer_loss_weight"),
        ({"reconstruction": ReconstructionConfig(rounding_weight=math.inf)}, "reconstruction.rounding_weight"),
        ({"tdac": TdacConfig(trajectories=0)}, "tdac.trajectories"),
        ({"tdac": TdacConfig(radius_quantile=1.5)}, "tdac.radius_quantile"),
        ({"tdac": TdacConfig(diversity_weight=-1.0)}, "tdac.diversity_weight"),
        ({"tdac": TdacConfig(min_per_step=-1)}, "tdac.min_per_step"),
        ({"tdac": TdacConfig(radius=-1.0)}, "tdac.radius"),
        ({"rules": (LayerRule("a", weight_bits=16),)}, "rule 'a' weight_bits"),
        ({"rules": (LayerRule("a", act_bits=1),)}, "rule 'a' act_bits"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**changes)


def test_rules_match_like_a_shell_and_mind_the_case():
    rule = LayerRule("up.*.conv?")
    assert rule.matches("up.0.res.conv1") and not rule.matches("up.conv1x") and not rule.matches("UP.0.conv1")


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(_TOML)
    assert make_config({}, path).weight_bits == 8
    config = make_config({"preset": "w4a6", "seed": 3, "iters": 2, "uniform": None}, path)
    assert (config.weight_bits, config.act_bits, config.seed, config.reconstruction.iters) == (4, 6, 3, 2)
    assert config.tdac.radius == 0.5 and not config.uniform
    assert make_config(
        {"weights_bits": 3, "acts_bits": 16, "attention": "int8", "method": "minmax"}, None
    ) == QuantConfig(3, 16, attention="int8", method="minmax")
    assert make_config({"preset": "w4a8", "weights_bits": 4}, None) == QuantConfig(4, 8)


def test_what_is_given_takes_the_place_of_the_methods_own():
    released = QuantConfig(method="eda-dm").recipe
    assert (released.symmetric, released.qdrop, released.selection, released.edges) == (True, 0.5, "tdac", False)
    given = QuantConfig(
        method="eda-dm", symmetric=False, selection="uniform", split=False, mean_correction=True,
        reconstruction=ReconstructionConfig(qdrop=0.0),
    ).recipe  # fmt: skip
    changed = {"symmetric": False, "qdrop": 0.0, "selection": "uniform", "split": False, "mean_correction": True}
    assert given == dataclasses.replace(released, **changed)
    assert QuantConfig().recipe == METHODS["default"]


def test_switches_of_the_command_line(tmp_path):
    config = make_config(
        {"method": "q-diffusion", "loss": "layer", "qdrop": 0.25, "split": False, "selection": "density"}, None
    )
    recipe = config.recipe
    assert (recipe.block_loss_weight, recipe.layer_loss_weight, recipe.qdrop) == (0.0, 1.0, 0.25)
    assert (recipe.split, recipe.selection, recipe.rounding_weight) == (False, "density", 0.01)
    path = tmp_path / "a.toml"
    path.write_text("[reconstruction]\nlayer_loss_weight = 0.5")
    assert make_config({"iters": 3}, path).recipe.layer_loss_weight == 0.5
    assert make_config({"loss": "block"}, path).recipe.layer_loss_weight == 0.0


@pytest.mark.parametrize(("option", "shown"), [("weights_bits", "--weights-bits 3"), ("acts_bits", "--acts-bits 3")])
def test_contradictions_are_refused(option, shown):
    with pytest.raises(ConfigError, match=f"--w8a8 and {shown} contradict"):
        make_config({"preset": "w8a8", option: 3}, None)


def test_a_file_that_misuses_a_table_is_refused_also_with_options(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("reconstruction = 3")
    with pytest.raises(ConfigError, match="expected a table"):
        make_config({"iters": 3}, path)


@pytest.mark.parametrize("text", ["", "3", "3,32", "3,32,32,1", "3,a,32", "3,0,32", "-1,2,2", "3;32;32"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(InputError, match="--shape"):
        parse_shape(text)


def test_shapes():
    assert parse_shape("3, 32,16") == (3, 32, 16)


_AUTOMATIC = {
    "both": (
        {"budget_bits": 5.0, "min_sqnr": 30.0},
        r"budget_bits = 5.0 and min_sqnr = 30.0 exclude each other.*one of",
    ),
    "uniform": ({"budget_bits": 5.0, "uniform": True}, r"budget_bits and uniform exclude each other.*drop one"),
    "minmax": ({"min_sqnr": 30.0, "method": "minmax"}, r'min_sqnr and method = "minmax" exclude each other'),
    "wide": ({"budget_bits": 5.0, "weight_bits": 6}, r"weight_bits: got 6 together with budget_bits.*at most 4"),
    "low": ({"budget_bits": 3.9}, r"budget_bits .*got 3.9, must be between 4.0 and 8.0"),
    "high": ({"budget_bits": 9}, r"budget_bits .*got 9, must be between 4.0 and 8.0"),
    "nan": ({"budget_bits": math.nan}, r"budget_bits .*got nan, must be"),
    "negative": ({"min_sqnr": -1.0}, r"min_sqnr \(dB\): got -1.0, must be between 0.0 and 120.0"),
    "endless": ({"min_sqnr": math.inf}, r"min_sqnr \(dB\): got inf, must be"),
}


@pytest.mark.parametrize("name", _AUTOMATIC)
def test_a_budget_or_a_quality_that_contradicts_other_settings_is_refused(name):
    changes, message = _AUTOMATIC[name]
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**changes)


def test_a_budget_and_a_quality_come_from_the_file_or_the_command_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("budget_bits = 5")
    assert make_config({}, path).budget_bits == 5 and make_config({"budget_bits": 4.5}, path).budget_bits == 4.5
    assert make_config({"min_sqnr": 31.5}, None).min_sqnr == 31.5
    assert make_config({}, path).is_automatic and not QuantConfig().is_automatic
    with pytest.raises(ConfigError, match="exclude each other"):
        make_config({"min_sqnr": 30.0}, path)
    with pytest.raises(ConfigError, match="together with min_sqnr"):
        make_config({"min_sqnr": 30.0, "preset": "w8a8"}, None)
    path.write_text("budget_bits = 'small'")
    with pytest.raises(ConfigError, match="budget_bits must be float"):
        make_config({}, path)
