"""Every plan computes what the reference engine computes, bit for bit, over an arena where nothing dead is ever read."""

import pytest
import torch

from edadm_compile.errors import InputError
from edadm_compile.ir.program import layers
from tests.graphs import TinyUNet
from tests.lowering.plans import inputs_of, lowered, plan_of, run
from tests.models.variants import VARIANTS


def check(program, batch=2, **target):
    plan = plan_of(program, batch, **target)
    inputs = inputs_of(program, batch)
    with torch.no_grad():
        expected = program(*inputs)
    assert torch.equal(run(program, plan, inputs), expected)
    return plan


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    program = lowered(VARIANTS[name]())
    check(program, program.signature.max_batch if program.signature.min_batch > 1 else 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["float", "int8"])
def test_batches_labels_and_attention(batch, attention):
    program = lowered(TinyUNet(classes=5), attention=attention, options={"num_classes": {"label": 5}})
    plan = check(program, batch)
    kernels = {launch.kernel for launch in plan.launches}
    assert ("attention" if attention == "int8" else "attention_float") in kernels


def test_library_attention():
    program = lowered(TinyUNet())
    plan = check(program, library_attention=True)
    assert any(launch.call and "scaled_dot_product" in launch.call[0] for launch in plan.launches)


def test_layers_left_in_float_keep_their_weights():
    """Only the rounding of their activations is gone: the float layer on dequantized codes is the integer layer."""
    program = lowered(TinyUNet())
    names = ("block1.conv1", "block2.emb", "merge.part0")
    known = {info.name for info in layers(program)}
    chosen = tuple(n for n in names if n in known and "block2.emb" not in n)
    plan, inputs = plan_of(program, float_layers=chosen), inputs_of(program, 2)
    left = [
        launch.layer
        for launch in plan.launches
        if launch.call and launch.call[0] in ("aten.conv2d.default", "aten.linear.default")
    ]
    assert sorted(left) == sorted(chosen) and len(chosen) == 2
    with torch.no_grad():
        expected = program(*inputs)
    result = run(program, plan, inputs)
    error = (result - expected).square().mean() / expected.square().mean()
    assert 0 < error < 0.01  # 8-bit activations of two layers are no longer rounded
    with pytest.raises(InputError, match="no integer layer"):
        plan_of(program, float_layers=("nothing",))
