import pytest
import torch
from torch import nn

from edadm_compile.config import LayerRule
from edadm_compile.ir.program import layer_of, layers
from edadm_compile.passes.assign_widths import AssignWidths, average_bits
from tests.graphs import GraphBuilder, TinyUNet, apply, count_ops, float_program, small_config, source_of


def _assigned(labelled, **changes):
    program, calibration = labelled
    after, ctx = apply(program, AssignWidths(), config=small_config(**changes), calibration=calibration)
    return after, {info.name: info for info in layers(after)}, ctx.stats["assign_widths"]


def _strict(labelled, **changes):
    return _assigned(labelled, uniform=True, **changes)[1]


def test_rule_1_the_stem_reads_sixteen_bits(labelled):
    _, infos, _ = _assigned(labelled)
    assert (infos["stem"].role, infos["stem"].weight_bits, infos["stem"].act_bits) == ("stem", 8, 16)
    for strict in (_strict(labelled), _assigned(labelled, method="minmax")[1]):
        assert (strict["stem"].weight_bits, strict["stem"].act_bits) == (8, 8)


def test_rule_2_the_head_has_eight_bits(labelled):
    for infos in (_assigned(labelled, act_bits=4)[1], _strict(labelled, act_bits=4)):
        assert (infos["head"].role, infos["head"].weight_bits, infos["head"].act_bits) == ("head", 8, 8)


def test_roles_follow_the_flow_of_values(labelled):
    _, infos, _ = _assigned(labelled)
    roles = {name: info.role for name, info in infos.items() if info.weight_shape}
    assert {n for n, r in roles.items() if r == "stem"} == {"stem"} and {
        n for n, r in roles.items() if r == "head"
    } == {"head"}
    assert roles["label_proj"] == roles["block1.emb"] == "conditioning"
    assert roles["merge.part0"] == roles["block1.conv1"] == roles["attention.q"] == "inner"
    assert "time.0" not in roles  # folded into the tables


def test_rule_3_what_cannot_run_in_integers_stays_float_with_a_reason():
    build = GraphBuilder()
    h = build.conv("stem", build.x, 4, 4)
    weight = build.constant("grouped.weight", build.random(4, 2, 3, 3))
    h = build.op("aten.conv_transpose2d.input", h, weight, None, [1, 1], [1, 1], [0, 0], 2)
    time = build.op("aten.reshape.default", build.op("aten._to_copy.default", build.t, dtype=torch.float32), [-1, 1])
    h = build.op(
        "aten.add.Tensor", h, build.op("aten.reshape.default", build.linear("time", time, 1, 4), [-1, 4, 1, 1])
    )
    program = build.program(build.conv("head", h, 4, 4))
    for node in program.graph_module.graph.nodes:
        node.meta.pop("layer", None)
    after, _ = apply(program, AssignWidths(), config=small_config(uniform=True))
    infos = {i.name: i for i in layers(after)}
    assert (infos["grouped"].weight_bits, infos["grouped"].act_bits) == (32, 32) and "grouped" in infos["grouped"].note
    assert infos["time"].weight_bits == 32 and "could not be folded" in infos["time"].note


def test_rule_4_inner_layers_get_the_requested_widths(labelled):
    for weight, act in ((4, 8), (8, 8), (3, 5)):
        infos = _strict(labelled, weight_bits=weight, act_bits=act)
        inner = [i for i in infos.values() if i.role in ("inner", "conditioning") and i.weight_shape]
        assert len(inner) > 10 and {(i.weight_bits, i.act_bits) for i in inner} == {(weight, act)}


def test_rule_5_the_layers_that_hurt_most_are_promoted_within_the_budget(labelled):
    program, infos, stats = _assigned(labelled, act_bits=6, promoted_share=0.4)
    promoted = stats["promoted"]
    assert promoted and all(
        (infos[n].weight_bits, infos[n].act_bits) == (8, 8) and "promoted" in infos[n].note for n in promoted
    )
    rest = [i for i in infos.values() if i.role == "inner" and i.weight_shape and i.name not in promoted]
    assert rest and {(i.weight_bits, i.act_bits) for i in rest} == {(4, 6)}
    sizes = {n: torch.Size(i.weight_shape).numel() for n, i in infos.items() if i.weight_shape}
    wide = sum(sizes[n] for n, i in infos.items() if i.weight_bits == 8 and i.weight_shape)
    assert wide <= 0.4 * sum(sizes.values())
    per_bit = {n: stats["sensitivity"][n] / sizes[n] for n in stats["sensitivity"]}
    assert max(per_bit, key=per_bit.get) in promoted
    assert average_bits(program) == pytest.approx(4 + 4 * wide / sum(sizes.values()))


@pytest.mark.parametrize(
    "changes",
    [{"uniform": True}, {"method": "minmax"}, {"weight_bits": 8, "act_bits": 8}, {"promoted_share": 0.0}],
    ids=str,
)
def test_rule_5_does_not_always_apply(labelled, changes):
    _, infos, stats = _assigned(labelled, **changes)
    assert not stats.get("promoted") and not any("promoted" in i.note for i in infos.values())


@pytest.mark.parametrize("budget", [None, 1])
def test_the_sensitivity_is_the_error_of_rounding_that_layer_alone(labelled, budget, monkeypatch):
    """Recomputed by changing the weight in the program and running it; with all rows together, and row by row."""
    from edadm_compile.passes import sensitivity

    if budget is not None:
        monkeypatch.setattr(sensitivity, "MOST_BYTES", budget)
    from edadm_compile.ir.analysis import layer_weight
    from edadm_compile.ir.program import set_constant
    from edadm_compile.passes.base import Context
    from edadm_compile.passes.sensitivity import measurement_inputs, sensitivities
    from edadm_compile.quant.affine import weight_codes
    from edadm_compile.quant.observers import search_weight
    from edadm_compile.quant.spec import weight_spec

    program, calibration = labelled
    annotated = _assigned(labelled)[0]
    node = next(n for n in annotated.graph_module.graph.nodes if layer_of(n) and layer_of(n).name == "block2.conv1")
    errors, signal = sensitivities(annotated, [node], 4, Context(small_config(), calibration=calibration))
    inputs = measurement_inputs(calibration.trajectories, annotated.signature)
    weight, spec = layer_weight(annotated, node), weight_spec(4)
    scale = search_weight(weight, spec, candidates=40)
    other = program.fork()
    set_constant(
        other.graph_module,
        "block2.conv1.weight",
        weight_codes(weight, scale, spec).float() * scale[:, None, None, None],
    )
    with torch.no_grad():
        exact, rounded = program(*inputs).double(), other(*inputs).double()
    assert signal == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert errors[node] == pytest.approx(float((rounded - exact).square().sum()), rel=1e-3) and errors[node] > 0


def test_rule_6_the_users_rules_come_last(labelled):
    rules = (
        LayerRule("block1.*", weight_bits=3),
        LayerRule("stem", act_bits=8),
        LayerRule("attention.?", act_bits=32),
        LayerRule("block1.conv2", weight_bits=2),
    )
    _, infos, _ = _assigned(labelled, rules=rules)
    assert (infos["block1.conv1"].weight_bits, infos["block1.conv1"].act_bits, infos["block1.conv1"].note) == (
        3,
        8,
        "rule 'block1.*'",
    )
    assert infos["block1.conv2"].weight_bits == 2
    assert (infos["stem"].weight_bits, infos["stem"].act_bits) == (8, 8)
    assert (infos["attention.q"].weight_bits, infos["attention.q"].act_bits) == (32, 32) and infos["attention.q"].note


def test_products_are_rows_of_the_table_too(labelled):
    _, infos, _ = _assigned(labelled)
    (product,) = [i for i in infos.values() if not i.weight_shape]
    assert product.kind == "attention" and product.weight_bits == 32 and "--attention int8" in product.note


def test_attention_products_can_have_eight_bits():
    config = small_config(attention="int8", uniform=True)
    program = float_program(source_of(TinyUNet()), config)
    after, _ = apply(program, AssignWidths(), config=config)
    products = [i for i in layers(after) if not i.weight_shape]
    assert [(i.kind, i.weight_bits, i.act_bits) for i in products] == [("matmul", 8, 8)] * 2


@pytest.mark.parametrize(("asked", "given"), [(16, 8), (4, 8), (32, 32)])
def test_rules_for_products_know_int8_and_float_only(asked, given):
    build = GraphBuilder(x=(2, 6, 6))
    out = build.op("aten.matmul.default", build.x, build.op("aten.silu.default", build.x))
    config = small_config(attention="int8", uniform=True, rules=(LayerRule("*", act_bits=asked),))
    after, _ = apply(build.program(out), AssignWidths(), config=config)
    assert [(i.weight_bits, i.act_bits) for i in layers(after)] == [(given, given)]


def test_no_operator_changes(labelled):
    after, _, _ = _assigned(labelled)
    assert count_ops(after) == count_ops(labelled[0])


def test_a_layer_on_constants_needs_no_quantization():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.proj = nn.Conv2d(3, 3, 1), nn.Linear(4, 3)

        def forward(self, x, t):
            return self.conv(x) + self.proj(torch.ones(x.shape[0], 4))[:, :, None, None]

    program = float_program(source_of(Model()))
    after, _ = apply(program, AssignWidths(), config=small_config(uniform=True))
    infos = {i.name: i for i in layers(after)}
    assert infos["conv"].weight_bits == 8
    assert "proj" not in infos or (infos["proj"].weight_bits == 32 and infos["proj"].note)
