"""One test per numbered rule of `Canonicalize`."""

import pytest
import torch
from torch import fx, nn

from edadm_compile.errors import CaptureError
from edadm_compile.ir.analysis import is_layer
from edadm_compile.ir.ops import op_name
from edadm_compile.passes.canonicalize import Canonicalize
from edadm_compile.passes.insert_quant import layer_name
from tests.graphs import (
    GraphBuilder,
    apply,
    assert_close,
    assert_same_function,
    captured,
    count_ops,
    inputs_for,
    nodes_of,
)


class _Model(nn.Module):
    """``forward(x, t)`` around a function of (self, x), with modules given by keyword."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            if isinstance(module, nn.Parameter):
                self.register_parameter(name, module)
            else:
                self.add_module(name, module)

    def forward(self, x, t):
        return self.function(self, x) + 0.01 * t.float()[:, None, None, None]


def _canonical(function, **modules):
    """(before, after, layer names)."""
    torch.manual_seed(1)
    before = captured(_Model(function, **modules))
    after, _ = apply(before, Canonicalize())
    assert_same_function(before, after)
    names = [layer_name(n) for n in after.graph_module.graph.nodes if is_layer(n)]
    return before, after, names


def _parameter(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3)


@pytest.mark.parametrize("operator", ["wrap_with_set_grad_enabled", "tag_activation_checkpoint"])
def test_rule_1_sub_graphs_are_inlined(operator):
    build = GraphBuilder(x=(2, 3, 3))
    body_root, body = nn.Module(), fx.Graph()
    body_root.register_buffer("inner", torch.tensor(2.0))
    y = body.placeholder("y")
    body.output(
        (
            body.call_function(torch.ops.aten.mul.Tensor, (y, body.get_attr("inner"))),
            body.call_function(torch.ops.aten.neg.default, (y,)),
        )
    )
    build.root.add_module("body", fx.GraphModule(body_root, body))
    function = getattr(torch.ops.higher_order, operator)
    attribute = build.graph.get_attr("body")
    call = build.graph.call_function(
        function, (False, attribute, build.x) if "grad" in operator else (attribute, build.x)
    )
    import operator as python

    items = [build.graph.call_function(python.getitem, (call, i)) for i in (0, 1)]
    out = build.op("aten.add.Tensor", items[0], build.op("aten.mul.Scalar", items[1], 0.5))
    after, ctx = apply(build.program(out, shapes=False), Canonicalize())
    assert ctx.stats["canonicalize"]["inlined"] == 1
    assert set(count_ops(after)) <= {"aten.mul.Tensor", "aten.neg.default", "aten.add.Tensor", "aten.mul.Scalar"}
    x, t = inputs_for(after)
    assert_close(after(x, t), 1.5 * x, depth=4)


def test_rule_2_assertions_vanish():
    build = GraphBuilder()
    build.op("aten._assert_tensor_metadata.default", build.x)
    size = build.op("aten.sym_size.int", build.x, 0)
    build.op("aten.sym_constrain_range_for_size.default", size)
    after, ctx = apply(build.program(build.op("aten.silu.default", build.x), shapes=False), Canonicalize())
    assert ctx.stats["canonicalize"]["asserts"] == 2 and count_ops(after) == {"aten.silu.default": 1}


def test_rule_3_views_become_reshapes_free_of_sizes():
    def function(self, x):
        b, c, h, w = x.shape
        tokens = x.view(b, c, h * w).transpose(1, 2)
        return tokens.reshape(b, h, w, c).permute(0, 3, 1, 2).contiguous().view(b, c, h, w)

    _, after, _ = _canonical(function)
    ops = count_ops(after)
    assert "aten.view.default" not in ops and ops["aten.reshape.default"] >= 2 and "aten.sym_size.int" not in ops


def test_rule_3_what_needs_the_batch_asks_x_for_it():
    def function(self, x):
        return torch.cat((x, torch.zeros(x.shape[0], 1, 8, 8)), dim=1)[:, :3]

    _, after, _ = _canonical(function)
    assert [n.args[0].target for n in nodes_of(after, "aten.sym_size.int")] == ["x"]


def test_rule_4_identities_vanish():
    def function(self, x):
        x = self.drop(x.clone().contiguous().detach().to(torch.float32))
        return torch.nn.functional.silu(x).expand(-1, -1, -1, -1)

    _, after, _ = _canonical(function, drop=nn.Dropout(0.5))
    assert not {
        n for n in count_ops(after) if any(w in n for w in ("clone", "contiguous", "detach", "dropout", "expand"))
    }
    assert all(
        n.args[0].target == "t"
        for n in after.graph_module.graph.nodes
        if n.op == "call_function" and "to" in op_name(n.target).split(".")[1]
    )


def test_rule_4_real_casts_and_expansions_stay():
    def function(self, x):
        return x.double().float() * x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)

    _, after, _ = _canonical(function)
    ops = count_ops(after)
    assert sum(n for name, n in ops.items() if "to" in name) >= 2 and ops["aten.expand.default"] == 1


def test_rule_5_constants_are_folded_and_keep_their_name():
    def function(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)  # weight standardisation
        grid = torch.arange(8, dtype=torch.float32) / 8
        return torch.nn.functional.conv2d(x, weight, padding=1) + grid

    _, after, names = _canonical(function, weight=_parameter(3, 3, 3, 3))
    ops = count_ops(after)
    assert names == ["weight"] and not {"aten.mean.dim", "aten.arange.default", "aten.sub.Tensor"} & set(ops)


_FORMS = {
    "conv1d": lambda self, x: self.layer(x.flatten(2)).reshape(x.shape),
    "conv_transpose1d": lambda self, x: self.layer(x.flatten(2))[:, :, :64].reshape(x.shape),
    "conv2d": lambda self, x: self.layer(x)[:, :, :8, :8],
}
_LAYERS = {
    "conv1d": nn.Conv1d(3, 3, 5, padding=4, dilation=2),
    "conv1d same": nn.Conv1d(3, 3, 3, padding="same"),
    "conv1d groups": nn.Conv1d(3, 3, 3, padding=1, groups=3, bias=False),
    "conv_transpose1d": nn.ConvTranspose1d(3, 3, 4, stride=2, padding=1),
    "conv2d same": nn.Conv2d(3, 3, 3, padding="same", dilation=2),
    "conv2d even same": nn.Conv2d(3, 3, (4, 2), padding="same"),
    "conv2d one even same": nn.Conv2d(3, 3, (2, 3), padding="same", bias=False),
}


@pytest.mark.parametrize("name", list(_LAYERS))
def test_rule_6_convolutions_have_one_form(name):
    _, after, names = _canonical(_FORMS[name.split()[0]], layer=_LAYERS[name])
    found = {n for n in count_ops(after) if "conv" in n}
    assert names == ["layer"] and found == {
        "aten.conv_transpose2d.input" if "transpose" in name else "aten.conv2d.default"
    }


def test_rule_6_valid_padding():
    _, after, names = _canonical(
        lambda self, x: self.layer(self.pad(x)), layer=nn.Conv2d(3, 3, 3, padding="valid"), pad=nn.ZeroPad2d(1)
    )
    assert names == ["layer"] and "aten.conv2d.default" in count_ops(after)


@pytest.mark.parametrize("transposed", [False, True])
def test_rule_6_the_general_convolution(transposed):
    build = GraphBuilder(x=(4, 5, 5))
    weight, bias = build.constant("c.weight", build.random(4, 4, 3, 3)), build.constant("c.bias", build.random(4))
    out = build.op(
        "aten.convolution.default",
        build.x,
        weight,
        bias,
        [2, 2],
        [1, 1],
        [1, 1],
        transposed,
        [1, 0] if transposed else [0, 0],
        1,
    )
    before = build.program(out)
    after, _ = apply(before, Canonicalize())
    assert_same_function(before, after)
    assert set(count_ops(after)) == {"aten.conv_transpose2d.input" if transposed else "aten.conv2d.default"}


def _tokens(function):
    return lambda self, x: function(self, x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


_PRODUCTS = {
    "matmul": (_tokens(lambda self, y: y @ self.w), {"w": (3, 3)}),
    "matmul from the left": (lambda self, x: self.w @ x, {"w": (8, 8)}),
    "mm": (lambda self, x: torch.mm(x.flatten(1), self.w).reshape(x.shape), {"w": (192, 192)}),
    "addmm": (
        lambda self, x: torch.addmm(self.b, x.flatten(1), self.w).reshape(x.shape),
        {"w": (192, 192), "b": (192,)},
    ),
    "addmm scaled": (
        lambda self, x: torch.addmm(self.b, x.flatten(1), self.w, beta=0.5, alpha=2.0).reshape(x.shape),
        {"w": (192, 192), "b": (192,)},
    ),
    "einsum": (lambda self, x: torch.einsum("bchw,co->bohw", x, self.w), {"w": (3, 3)}),
    "einsum turned": (lambda self, x: torch.einsum("oc,bchw->bohw", self.w, x), {"w": (3, 3)}),
}


@pytest.mark.parametrize("name", list(_PRODUCTS))
def test_rule_7_products_with_a_constant_are_linear_layers(name):
    function, shapes = _PRODUCTS[name]
    _, after, names = _canonical(function, **{k: _parameter(*s) for k, s in shapes.items()})
    ops = count_ops(after)
    assert names == ["w"] and ops["aten.linear.default"] == 1
    assert not {n for n in ops if any(w in n for w in ("matmul", ".mm.", "addmm", "einsum"))}


def test_rule_7_products_of_two_activations_stay():
    _, after, names = _canonical(lambda self, x: x @ x.transpose(2, 3))
    assert not names and count_ops(after)["aten.matmul.default"] == 1


def _norm():
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        for value in (norm.weight, norm.bias, norm.running_mean):
            value.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize("bias", [True, False])
def test_rule_8_batch_norms_disappear_into_convolutions(bias):
    _, after, names = _canonical(
        lambda self, x: self.norm(self.conv(x)), conv=nn.Conv2d(3, 3, 3, padding=1, bias=bias), norm=_norm()
    )
    assert names == ["conv"] and not [n for n in count_ops(after) if "batch_norm" in n]


@pytest.mark.parametrize("operator", ["aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"])
def test_rule_8_both_spellings(operator):
    build = GraphBuilder()
    conv = build.conv("c", build.x, 4, 4)
    values = [build.constant(f"n.{name}", build.random(4).abs() + 0.5) for name in ("weight", "bias", "mean", "var")]
    rest = (0.1, 1e-3) if "native" in operator else (False, 0.1, 1e-3, True)
    norm = build.op(operator, conv, *values, *rest)
    if "native" in operator:
        import operator as python

        norm = build.graph.call_function(python.getitem, (norm, 0))
    before = build.program(build.op("aten.add.Tensor", build.op("aten.silu.default", norm), norm))
    after, ctx = apply(before, Canonicalize())
    assert_same_function(before, after)
    assert ctx.stats["canonicalize"]["batch_norms"] == 1 and set(count_ops(after)) == {
        "aten.conv2d.default",
        "aten.silu.default",
        "aten.add.Tensor",
    }


def test_rule_8_a_convolution_that_others_read_keeps_its_norm():
    def function(self, x):
        y = self.conv(x)
        return self.norm(y) + y

    _, after, _ = _canonical(function, conv=nn.Conv2d(3, 3, 3, padding=1), norm=_norm())
    assert sum(count for n, count in count_ops(after).items() if "batch_norm" in n) == 1


def test_rule_8_one_convolution_with_two_norms():
    _canonical(
        lambda self, x: self.a(self.conv(x)) - self.b(self.conv(x * 2)),
        conv=nn.Conv2d(3, 3, 3, padding=1),
        a=_norm(),
        b=_norm(),
    )


def test_rule_9_swish_by_hand_is_silu():
    _, after, _ = _canonical(lambda self, x: x * torch.sigmoid(x) + torch.sigmoid(x + 1) * (x + 1))
    ops = count_ops(after)
    # The two additions x + 1 are separate nodes: only the first product is a silu of one node.
    assert ops["aten.silu.default"] == 1 and ops["aten.sigmoid.default"] == 1

    def turned(self, x):
        y = x + 1
        return torch.sigmoid(y) * y

    assert count_ops(_canonical(turned)[1])["aten.silu.default"] == 1


def test_rule_9_a_gate_is_no_swish():
    _, after, _ = _canonical(lambda self, x: x * torch.sigmoid(-x))
    assert "aten.silu.default" not in count_ops(after)


def test_rule_10_every_use_of_a_weight_has_its_own_name():
    def function(self, x):
        return self.b(self.a(self.a(x)) + self.a(x))

    a = nn.Conv2d(3, 3, 3, padding=1)
    b = nn.Conv2d(3, 3, 3, padding=1)
    b.weight = a.weight  # tied
    _, after, names = _canonical(function, a=a, b=b)
    assert len(names) == len(set(names)) == 4 and {"a", "b"} <= set(names)
    weights = [n.args[1].target for n in after.graph_module.graph.nodes if is_layer(n)]
    assert len(set(weights)) == 4


def test_operators_outside_the_table_are_named_with_their_place():
    class Fourier(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x).abs().mean() + x

    with pytest.raises(CaptureError, match=r"aten\.fft_rfft2\.default \(in .*odd"):
        apply(captured(_Model(lambda self, x: self.odd(x), odd=Fourier())), Canonicalize())
