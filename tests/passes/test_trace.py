import pytest
import torch
from torch import nn

from edadm_compile.errors import CaptureError
from edadm_compile.passes.capture import pick_tensor
from tests.graphs import TinyUNet, assert_close, captured, inputs_for, source_of


def test_the_batch_is_free_with_and_without_conditions():
    for model, options in ((TinyUNet(), {}), (TinyUNet(classes=5), {"num_classes": {"label": 5}})):
        program = captured(model, **options)
        assert (program.signature.min_batch, program.signature.max_batch) == (1, 1024)
        for batch in (1, 2, 5):
            inputs = inputs_for(program, batch)
            with torch.no_grad():
                assert_close(program(*inputs), model(*inputs))


def test_names_are_those_of_the_source():
    model = TinyUNet()
    program = captured(model)
    constants = {str(n.target) for n in program.graph_module.graph.nodes if n.op == "get_attr"}
    assert set(dict(model.named_parameters())) <= constants
    conv = next(
        n for n in program.graph_module.graph.nodes if n.op == "call_function" and "block1.conv1" in n.meta["scope"]
    )
    assert conv.meta["scope"] == ("block1", "block1.conv1")


class _Branching(nn.Module):
    """Does something else from 64 images on: `above(x * 2)`."""

    def __init__(self, above):
        super().__init__()
        self.above = above
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        y = self.conv(x) + t.reshape(-1, 1, 1, 1)
        return (self.above(y) if x.shape[0] >= 64 else y).relu()


def test_a_branch_on_the_batch_that_changes_the_memory_layout_alone_does_not_end_the_range():
    """As diffusers' upsampling has one at 64."""
    assert captured(_Branching(lambda y: y.contiguous())).signature.max_batch == 1024
    assert captured(_Branching(lambda y: y * 2)).signature.max_batch == 63
    assert captured(_Branching(lambda y: y.abs())).signature.max_batch == 63


class _FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x).reshape(2, 3, 8, 8) + t.reshape(2, 1, 1, 1)


def test_a_model_with_a_fixed_batch_says_so_and_still_runs_any_batch():
    model = _FixedBatch()
    program = captured(model)
    assert (program.signature.min_batch, program.signature.max_batch) == (
        2,
        2,
    ) and "batch fixed at 2" in program.signature.source
    inputs = inputs_for(program, 5)
    with torch.no_grad():
        expected = torch.cat([model(inputs[0][[i, i]], inputs[1][[i, i]])[:1] for i in range(5)])
        assert_close(program(*inputs), expected)


def test_a_layer_that_escapes_the_graph_is_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x, t):
            if torch.compiler.is_compiling():
                return x * 2
            return self.conv(x)

    with pytest.raises(CaptureError, match=r"hidden from the captured graph.*: conv"):
        captured(Model())


def test_data_dependent_control_flow_is_explained():
    class Model(nn.Module):
        def forward(self, x, t):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Model"):
        source_of(Model()).export()


def test_results_are_found_in_whatever_a_model_returns():
    class Output:
        sample = torch.ones(1)

    tensor = torch.ones(1)
    assert pick_tensor(tensor) is tensor and pick_tensor((tensor, 3)) is tensor and pick_tensor([tensor]) is tensor
    assert pick_tensor(Output()) is Output.sample
    for bad in ({}, (), 3):
        with pytest.raises(CaptureError, match="returned"):
            pick_tensor(bad)
