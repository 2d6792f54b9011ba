"""Single-head self-attention with two projections: the same function, and only where it applies."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from edadm_compile.config import QuantConfig
from edadm_compile.ir.analysis import is_layer
from edadm_compile.passes.base import Context, run_passes
from edadm_compile.passes.fold_attention import FoldAttention
from edadm_compile.passes.insert_quant import layer_name
from edadm_compile.pipeline import capture, float_passes
from tests.graphs import assert_close, assert_same_function, count_ops, source_of

DEPLOY = QuantConfig(deploy="onnxruntime")
ATTENTION = "aten.scaled_dot_product_attention.default"
WIDTH = 6


def _split(v, heads=1):
    return v.view(v.shape[0], v.shape[1], heads, -1).transpose(1, 2)


def _merge(v):
    return v.transpose(1, 2).reshape(v.shape[0], v.shape[2], -1)


def _unsqueeze(v):
    return v.unsqueeze(1)


def _squeeze(v):
    return v.squeeze(1)


def _channels(v):
    """Channels attend to each other, as in Restormer."""
    return v.transpose(1, 2).unsqueeze(1)


def _from_channels(v):
    return v.squeeze(1).transpose(1, 2)


def _shuffled(v):
    """Read as [channels, tokens] and cut up again as tokens."""
    return v.transpose(1, 2).reshape(v.shape[0], 1, v.shape[1], v.shape[2])


class Attention(nn.Module):
    """Attention over pixels, one thing about it different from the plain form.

    Args:
        biases: of the projections of queries, keys, values and of the output.
        inner: width of queries and keys.
        views: how a head dimension comes and goes.
        change: what else is different.
    """

    def __init__(self, biases=(1, 1, 1, 1), inner=WIDTH, values=WIDTH, scale=None, views=(_split, _merge), change=""):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 1)
        self.q, self.k = nn.Linear(WIDTH, inner, bool(biases[0])), nn.Linear(WIDTH, inner, bool(biases[1]))
        self.v = nn.Linear(WIDTH, values, bool(biases[2]))
        self.out = nn.Linear(values, WIDTH, bool(biases[3]))
        self.q_k = nn.Linear(WIDTH, WIDTH)
        self.scale, self.views, self.change = scale, views, change
        for parameter in self.parameters():  # scores far from uniform, biases that matter
            parameter.data.normal_()

    def forward(self, x, t):
        change, into, back = self.change, *self.views
        tokens = other = self.stem(x).flatten(2).transpose(1, 2)
        if change in ("keys and values elsewhere", "values elsewhere", "keys elsewhere"):
            other = torch.tanh(tokens)
        q = self.q(tokens)
        k = self.k(tokens if change == "values elsewhere" else other)
        v = self.v(tokens if change == "keys elsewhere" else other)
        extra = q.mean() if change == "queries read twice" else v.mean() if change == "values read twice" else 0.0
        if change == "nonlinear queries":
            q = torch.tanh(q)
        if change == "keys scaled":
            k = k * 0.5
        if change == "bias computed":
            q = functional.linear(tokens, self.q.weight, self.q.bias * t.float().mean())
        if change == "two heads":
            q, k, v = (_split(value, 2) for value in (q, k, v))
        else:
            q, k, v = into(q), into(k), into(v)
        if change == "head read twice":
            extra = k.mean()
        mask = torch.tensor([[0.0] * 9 + [-2.0]]) if change == "mask" else None
        h = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=change == "causal", scale=self.scale)
        if change == "attention read twice":
            extra = h.mean()
        h = back(h)
        if change == "nonlinear result":
            h = torch.tanh(h)
        h = h + extra if change == "no output projection" else self.out(h) + extra
        if change == "a layer called q_k":
            h = h + self.q_k(tokens)
        return (h + tokens).transpose(1, 2).reshape(x.shape[0], WIDTH, *x.shape[2:])


def programs(module, shape=(3, 2, 5), config=DEPLOY):
    """The float program before and after the pass, and what the pass says."""
    passes = [p for p in float_passes() if not isinstance(p, FoldAttention)]
    before = run_passes(capture(source_of(module.eval(), shape, 2)), passes, Context(QuantConfig()))
    context = Context(config)
    return before, run_passes(before, [FoldAttention()], context), context.stats["fold_attention"]


def make(**options):
    torch.manual_seed(3)
    return Attention(**options)


def linears(program):
    return [
        layer_name(n)
        for n in program.graph_module.graph.nodes
        if is_layer(n) and str(n.target) == "aten.linear.default"
    ]


def check_folded(module, shape=(3, 2, 5)):
    before, after, stats = programs(module, shape)
    assert stats["folded"] == 1 and stats["changed"] is True
    assert_same_function(before, after)
    x, t = torch.randn(4, *shape), torch.tensor([5, 70, 70, 0])
    with torch.no_grad():
        assert_close(after(x, t), module(x, t))
    return after


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("biases", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)], ids=str)  # fmt: skip
def test_the_function_is_the_same(biases, scale):
    check_folded(make(biases=biases, scale=scale))


@pytest.mark.parametrize("views", [(_split, _merge), (_unsqueeze, _squeeze)], ids=["split", "unsqueeze"])
@pytest.mark.parametrize(("width", "shape"), [(3, (3, 2, 5)), (10, (3, 1, 1)), (WIDTH, (3, 2, 3))], ids=str)
def test_any_width_of_the_head_any_number_of_tokens(views, width, shape):
    check_folded(make(inner=width, values=width, views=views), shape)


@pytest.mark.parametrize("scale", [0.7, None])  # fmt: skip
@pytest.mark.parametrize(("inner", "values"), [(3, 8), (8, 3)])
def test_the_default_scale_is_that_of_the_queries(inner, values, scale):
    check_folded(make(inner=inner, values=values, scale=scale))


def test_two_products_and_a_softmax_with_the_tokens_themselves_as_keys_and_values():
    _, after, _ = programs(make())
    ops = count_ops(after)
    assert ops["aten.matmul.default"] == 2 and ops["aten.softmax.int"] == 1
    scores, mixed = [n for n in after.graph_module.graph.nodes if str(n.target) == "aten.matmul.default"]
    tokens = mixed.args[1]
    assert scores.args[1].args[0] is tokens is scores.args[0].args[0] and scores.args[0].args[1].target == "q_k.weight"
    assert {"q_k", "v_out"} <= set(linears(after))


def test_two_projections_remain_of_four():
    before, after, _ = programs(make())
    assert linears(before) == ["q", "k", "v", "out"]
    assert linears(after) == ["q_k", "v_out"]
    assert ATTENTION not in count_ops(after)


def test_two_projections_remain_with_integer_products():
    source = source_of(make().eval(), (3, 2, 5), 2)
    plain = run_passes(capture(source), float_passes(), Context(QuantConfig(attention="int8")))
    folded = run_passes(capture(source), float_passes(), Context(QuantConfig(attention="int8", deploy="onnxruntime")))
    assert (len(linears(plain)), linears(folded)) == (4, ["q_k", "v_out"])
    assert count_ops(plain)["aten.matmul.default"] == count_ops(folded)["aten.matmul.default"] == 2
    assert_same_function(plain, folded)


@pytest.mark.parametrize(
    "change",
    [
        "two heads", "mask", "causal", "keys and values elsewhere", "values elsewhere", "keys elsewhere",
        "queries read twice", "values read twice", "head read twice", "attention read twice", "nonlinear queries", "keys scaled",
        "nonlinear result", "no output projection",
        "bias computed",
    ],
)  # fmt: skip
def test_other_attention_stays(change):
    before, after, stats = programs(make(change=change))
    assert stats["folded"] == 0 and stats["changed"] is False
    assert linears(before) == linears(after) and count_ops(before)[ATTENTION] == count_ops(after)[ATTENTION] == 1
    assert_same_function(before, after, depth=0)


@pytest.mark.parametrize(
    ("views", "shape"),
    [
        ((_channels, _from_channels), (3, 2, 3)), ((_unsqueeze, _from_channels), (3, 2, 3)),
        ((_shuffled, _squeeze), (3, 2, 3)), ((_shuffled, _squeeze), (3, 2, 5)),
    ],
    ids=["channel attention", "turned result", "square shuffle", "shuffle"],
)  # fmt: skip
def test_views_that_mix_tokens_and_channels_block_the_fold(views, shape):
    before, after, stats = programs(make(views=views), shape)
    assert_same_function(before, after)
    assert stats["folded"] == 0


def test_layers_keep_their_own_weights():
    before, after, stats = programs(make(change="a layer called q_k"))
    assert stats["folded"] == 1 and len(set(linears(after))) == len(linears(after))
    assert_same_function(before, after)


@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(attention="int8")], ids=["float", "int8"])
def test_programs_for_other_engines_stay(config):
    before, after, stats = programs(make(), config=config)
    assert stats["folded"] == 0 and stats["changed"] is False
    assert [n.name for n in before.graph_module.graph.nodes] == [n.name for n in after.graph_module.graph.nodes]


def test_every_attention_of_a_model_is_folded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make(), make(biases=(0, 0, 0, 0), change="causal")
            self.third = make(biases=(1, 0, 1, 0), scale=0.2)
            for module in (self.second, self.third):
                module.stem = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x, t):
            h = torch.tanh(self.second(torch.tanh(self.first(x, t)), t))
            return self.third(h, t)

    torch.manual_seed(1)
    before, after, stats = programs(Two())
    assert stats["folded"] == 2
    assert_same_function(before, after)
    assert {"first.q_k", "first.v_out", "third.q_k", "third.v_out", "second.q"} <= set(linears(after))
