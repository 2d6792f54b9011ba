import operator

import pytest
import torch

from edadm_compile.ir import ops

#: Spellings that only other torch versions have.
KNOWN_ABSENT = {
    "aten.logsigmoid.default",
    "aten.normalize.default",
    "aten.softsign.default",
    "aten.upsample_nearest_exact2d.vec",
}
ALL = sorted(ops.FLOAT_OPS | ops.QDQ_OPS | ops.LOWERED_OPS)


def test_the_table_resolves_and_names_round_trip():
    absent = set()
    for name in ALL:
        try:
            target = ops.resolve(name)
        except KeyError:
            absent.add(name)
            continue
        assert ops.op_name(target) == name
    assert absent <= KNOWN_ABSENT
    assert len(ALL) - len(absent) > 250


@pytest.mark.parametrize(
    "name",
    ["os.system", "aten.system.default", "aten.conv2d", "aten.random_.default", "aten.set_.source_Tensor", "operator.attrgetter", "eval", "", "..",
     "aten.__class__.default", "edadm.unknown.default", "prims.add.default", "aten.randn.default", "operator.setitem", "builtins.getattr"],
)  # fmt: skip
def test_names_outside_the_table_are_refused(name):
    with pytest.raises(KeyError):
        ops.resolve(name)


def test_the_table_holds_pure_functions_only():
    for name in ALL:
        if name in KNOWN_ABSENT or name.startswith("operator."):
            continue
        schema = ops.resolve(name)._schema
        assert not schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in ops.resolve(name).tags or name in (
            "aten.dropout.default",
            "aten.scaled_dot_product_attention.default",
        )


def test_layers_and_products_are_float_operators():
    assert set(ops.LAYER_OPS) <= ops.FLOAT_OPS
    assert not ops.LOWERED_OPS & set(ops.LAYER_OPS)


def test_names_of_targets():
    assert ops.op_name(torch.ops.aten.silu.default) == "aten.silu.default"
    assert ops.op_name(operator.getitem) == "operator.getitem"
    assert ops.op_name(len) == "len"
    assert ops.op_name("some.constant") == "some.constant"
