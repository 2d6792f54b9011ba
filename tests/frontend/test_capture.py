"""What capture must refuse, what it must see through, and what it must find without a name to go by."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_compile.config import QuantConfig
from edadm_compile.errors import CaptureError
from edadm_compile.frontend import Source, source_from_module
from edadm_compile.frontend.exported import load as load_archive
from edadm_compile.ir.ops import LAYER_OPS, op_name
from edadm_compile.ir.program import Program, SamplerSpec
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.pipeline import capture, float_passes
from tests.models.variants import SIZE, WIDTH, Shell, make

SAMPLER = SamplerSpec({"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "beta_schedule": "linear"}, 3)
X, T = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([66, 5])


def float_program(source: Source) -> Program:
    return run_passes(capture(source), float_passes(), Context(QuantConfig()))


def exported(model: nn.Module, tmp_path: Any, **settings: Any) -> Source:
    torch.export.save(torch.export.export(model, (X, T), **settings), tmp_path / "model.pt2")
    return load_archive(tmp_path / "model.pt2", SAMPLER, {}, {})


class Body(nn.Module):
    """A convolution with something done to it by subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        return h + self.change(self.conv(h))

    def change(self, y: Tensor) -> Tensor:
        return y


class Branch(Body):
    def change(self, y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y


class Counter(Body):
    def change(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * self.calls


class ConstantNoise(Body):
    """The noise has no input: folding it would freeze one draw into the program."""

    def change(self, y: Tensor) -> Tensor:
        return y + torch.randn(WIDTH, SIZE, SIZE)


class Noise(Body):
    def change(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y)


class Fourier(Body):
    def change(self, y: Tensor) -> Tensor:
        return torch.fft.fft2(y).real


class Dropout(Body):
    def change(self, y: Tensor) -> Tensor:
        return nn.functional.dropout(y, 0.5, self.training)


class Norm(Body):
    def change(self, y: Tensor) -> Tensor:
        return self.norm(y)


@torch.library.custom_op("edadm_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator whose body holds a convolution that no graph shows."""
    return Hidden.last.conv(x)


@opaque.register_fake
def _opaque(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Hidden(Body):
    last: Hidden

    def __init__(self) -> None:
        super().__init__()
        self.wasted = nn.Conv2d(WIDTH, WIDTH, 1)
        Hidden.last = self

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        self.wasted(h)
        return h + torch.ops.edadm_tests.opaque(h)


class Wasted(Body):
    """A layer that runs for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.wasted = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        self.wasted(h)
        return super().forward(h, emb)


class RawHidden(Hidden):
    """The hidden tensor belongs to no layer class."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))
        del self.conv

    def conv(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * self.gain


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (Branch, ("torch.export cannot capture Shell", "data-dependent")),
        (Counter, ("aten.copy_.default",)),
        (ConstantNoise, ("aten.randn.default (in body)", "ops.py")),
        (Noise, ("aten.randn_like.default (in body)",)),
        (Fourier, ("aten.fft_fft2.default (in body)",)),
    ],
    ids=["a branch on values", "a counter", "constant noise", "noise", "an operator outside the table"],
)
def test_what_cannot_be_an_integer_program_is_refused_by_name(body: type[Body], words: tuple[str, ...]) -> None:
    with pytest.raises(CaptureError) as caught:
        float_program(source_from_module(Shell(body()).eval(), SAMPLER))
    for word in words:
        assert word in str(caught.value)


def test_a_hidden_layer_is_named() -> None:
    with pytest.raises(
        CaptureError, match=r"1 layer\(s\) of the model are hidden .*: body\.conv\. .*use_checkpoint=False"
    ):
        capture(source_from_module(Shell(Hidden()).eval(), SAMPLER))


def test_a_hidden_parameter_outside_any_layer_is_named() -> None:
    with pytest.raises(CaptureError, match=r"hidden .*: body\. "):
        capture(source_from_module(Shell(RawHidden()).eval(), SAMPLER))


def test_the_search_for_hidden_layers_leaves_the_model_as_it_was() -> None:
    model = Shell(Wasted()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(source_from_module(model, SAMPLER))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_that_runs_for_nothing_is_no_error_but_a_note() -> None:
    program = float_program(source_from_module(Shell(Wasted()).eval(), SAMPLER))
    assert any("body.wasted" in note for note in program.notes)


@pytest.mark.parametrize("body", [Dropout, Norm])
def test_an_archive_exported_in_training_mode_is_refused(body: type[Body], tmp_path: Any) -> None:
    with pytest.raises(CaptureError, match=r"exported in training mode: call model\.eval\(\)"):
        float_program(exported(Shell(body()).train(), tmp_path))


@pytest.mark.parametrize(
    "name", ["einsum_attention_in_own_checkpoint", "torch_checkpoint", "torch_checkpoint_reentrant"]
)
def test_checkpoint_wrappers_in_an_archive_exported_with_gradients_are_inlined(name: str, tmp_path: Any) -> None:
    model = make(name)
    nested = torch.export.export(model, (X, T))
    program = float_program(exported(model, tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(program(X, T), model(X, T), rtol=1e-4, atol=2e-6)
    found = {layer_name(n) for n in program.graph_module.graph.nodes if op_name(n.target) in LAYER_OPS}
    inside = {"body.qkv", "body.proj_out"} if "einsum" in name else {"body.inner.2"}
    assert inside <= found
    if name != "einsum_attention_in_own_checkpoint":
        return
    # The case is a real one: without inlining these layers are invisible at the top level.
    top = {str(n.target) for n in nested.graph.nodes if n.op == "call_function"}
    assert any("set_grad" in t for t in top)


@pytest.mark.parametrize(
    "name",
    ["bmm_attention", "token_linear", "einsum_attention_in_own_checkpoint", "masked_attention", "sequence_first"],
)
def test_attention_decomposed_for_integers_computes_the_same(name: str) -> None:
    model = make(name)
    program = run_passes(
        capture(source_from_module(model, SAMPLER)), float_passes(), Context(QuantConfig(attention="int8"))
    )
    with torch.no_grad():
        torch.testing.assert_close(program(X, T), model(X, T), rtol=1e-4, atol=2e-6)
    names = {op_name(n.target) for n in program.graph_module.graph.nodes}
    assert "aten.matmul.default" in names and not names & {"aten.bmm.default", "aten.einsum.default"}


@pytest.mark.parametrize("low", [1, 3])
def test_batch_limits_of_an_archive_are_kept(low: int, tmp_path: Any) -> None:
    model = make("scale_shift")
    batch = torch.export.Dim("batch", min=low, max=6)
    size = max(2, low)
    program = torch.export.export(
        model, (X[:1].repeat(size, 1, 1, 1), T[:1].repeat(size)), dynamic_shapes=({0: batch}, {0: batch})
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (tmp_path / "model.pt2").write_bytes(buffer.getvalue())
    result = float_program(load_archive(tmp_path / "model.pt2", SAMPLER, {}, {}))
    assert (result.signature.min_batch, result.signature.max_batch) == (low, 6)
    x, t = torch.randn(13, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.arange(13)
    with torch.no_grad():
        torch.testing.assert_close(result(x, t), model(x, t), rtol=1e-4, atol=2e-6)
