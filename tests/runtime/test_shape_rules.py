"""The rules beside torch's own shape functions: same shape, type and order in memory, or no answer."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm_compile.runtime.shape_rules import shape_rule

_TYPES = (torch.float32, torch.float16)


@st.composite
def tensors(draw, rank=None, shape=None):
    """Meta tensors, some of them transposed, sliced or expanded."""
    sizes = shape or draw(st.lists(st.integers(1, 4), min_size=rank or 1, max_size=rank or 4))
    order = draw(st.permutations(range(len(sizes))))
    base = torch.empty(
        [sizes[d] for d in order], dtype=draw(st.sampled_from((*_TYPES, *_TYPES, torch.int64))), device="meta"
    )
    value = base.permute([order.index(d) for d in range(len(sizes))])
    form = draw(st.sampled_from(("plain", "plain", "slice", "expand")))
    if form == "slice":
        wide = torch.empty([*sizes[:-1], 2 * sizes[-1]], dtype=value.dtype, device="meta")
        return wide[..., : sizes[-1]]
    return value[..., :1].expand(sizes) if form == "expand" else value


@st.composite
def related(draw, rank=4):
    """Two tensors, the second one of the same shape, of one that broadcasts, or of any."""
    first = draw(tensors(rank=rank))
    kind = draw(st.sampled_from(("same", "ones", "any")))
    if kind == "any":
        return first, draw(tensors())
    shape = [n if kind == "same" or draw(st.booleans()) else 1 for n in first.shape]
    pair = first, draw(tensors(shape=shape))
    return pair if draw(st.booleans()) else pair[::-1]


def _layout(value):
    """Strides of the dimensions that have more than one place."""
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]


def check(name, *args):
    """A rule's answer is torch's, and it has none where torch refuses; returns whether it has one."""
    found = shape_rule(name, args, {})
    packet, overload = name.removeprefix("aten.").split(".")
    try:
        expected = getattr(getattr(torch.ops.aten, packet), overload)(*args)
    except (RuntimeError, IndexError, TypeError, ValueError, ArithmeticError, AssertionError, NotImplementedError):
        assert found is None, (name, args)
        return False
    if found is not None:
        assert found.shape == expected.shape and found.dtype == expected.dtype and found.device.type == "meta"
        assert _layout(found) == _layout(expected), (name, args)
    return found is not None


@settings(max_examples=150, deadline=None)
@given(pair=related(), name=st.sampled_from(("add", "sub", "mul", "div")), number=st.sampled_from((None, 2, 0.5)))
def test_binary(pair, name, number):
    check(f"aten.{name}.Tensor", pair[0], pair[1] if number is None else number)


@settings(max_examples=100, deadline=None)
@given(value=tensors(), name=st.sampled_from(("silu", "gelu", "sin", "cos", "exp", "relu")))
def test_unary(value, name):
    check(f"aten.{name}.default", value)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=tensors(), groups=st.integers(0, 3), size=st.integers(1, 4))
def test_norms(data, value, groups, size):
    weight = data.draw(st.sampled_from((None, torch.empty(size, device="meta"), torch.empty(size, 2, device="meta"))))
    check("aten.group_norm.default", value, groups, weight, weight, 1e-5, False)
    shape = data.draw(st.sampled_from(([size], [size, size], list(value.shape[-1:]), [])))
    plain = torch.empty(shape, device="meta")
    check("aten.layer_norm.default", value, shape, data.draw(st.sampled_from((None, plain))), plain, 1e-5, False)


@settings(max_examples=150, deadline=None)
@given(pair=related(rank=3), dim=st.integers(-4, 4))
def test_cat(pair, dim):
    check("aten.cat.default", list(pair), dim)


@settings(max_examples=100, deadline=None)
@given(q=tensors(rank=4), rows=st.integers(1, 3), width=st.integers(1, 3), other=tensors(rank=4))
def test_attention(q, rows, width, other):
    k = torch.empty(*q.shape[:2], rows, q.shape[3], dtype=q.dtype, device="meta")
    v = torch.empty(*q.shape[:2], rows, width, dtype=q.dtype, device="meta")
    check("aten.scaled_dot_product_attention.default", q, k, v)
    check("aten.scaled_dot_product_attention.default", q, k, other)


@settings(max_examples=100, deadline=None)
@given(value=tensors(), outputs=st.integers(1, 4), inputs=st.integers(1, 4), bias=st.sampled_from((None, 0, 1)))
def test_linear(value, outputs, inputs, bias):
    weight = torch.empty(outputs, inputs, dtype=value.dtype, device="meta")
    given = [] if bias is None else [torch.empty(outputs + bias, dtype=value.dtype, device="meta")]
    check("aten.linear.default", value, weight, *given)


@settings(max_examples=60, deadline=None)
@given(
    value=tensors(),
    size=st.sampled_from((None, None, [3, 3])),
    scales=st.sampled_from((None, [2.0, 2.0], [1.5, 0.4], [-1.0, 2.0])),
)
def test_nearest(value, size, scales):
    check("aten.upsample_nearest2d.vec", value, size, scales)


@settings(max_examples=50, deadline=None)
@given(weight=tensors(rank=2), rows=tensors(), two=tensors())
def test_embedding(weight, rows, two):
    check("aten.embedding.default", weight, rows)
    check("aten.embedding.default", weight, torch.empty(rows.shape, dtype=torch.int64, device="meta"))
    check("aten.embedding.default", two, torch.empty(rows.shape, dtype=torch.int64, device="meta"))


_PAIRS = st.sampled_from(([1, 1], [2, 1], [0, 1], [2, 2], [-1, 0], [3, 3], [1]))


@settings(max_examples=200, deadline=None)
@given(
    value=tensors(rank=4), outputs=st.integers(1, 4), inputs=st.integers(1, 2), kernel=st.integers(1, 3), data=st.data(),
    groups=st.integers(0, 2), bias=st.sampled_from((None, 0, 1)),
)  # fmt: skip
def test_convolution(value, outputs, inputs, kernel, data, groups, bias):
    wanted = inputs if data.draw(st.booleans()) else value.shape[1] // max(1, groups)
    weight = torch.empty(outputs, wanted, kernel, 1, dtype=value.dtype, device="meta")
    given = None if bias is None else torch.empty(outputs + bias, dtype=value.dtype, device="meta")
    rest = [data.draw(_PAIRS), data.draw(_PAIRS), data.draw(_PAIRS), groups][: data.draw(st.integers(0, 4))]
    check("aten.conv2d.default", value, weight, given, *rest)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("conv2d.default", ((2, 8, 4, 4), (4, 8, 3, 3), (4,))), ("linear.default", ((2, 5, 8), (4, 8), (4,))), ("add.Tensor", ((2, 8, 4, 4), (2, 8, 1, 1))), ("silu.default", ((2, 8, 4, 4),)), ("gelu.default", ((2, 4, 8),)),
        ("scaled_dot_product_attention.default", ((2, 2, 9, 4), (2, 2, 5, 4), (2, 2, 5, 4))),
    ],
)  # fmt: skip
def test_the_usual_shapes_have_an_answer(name, shapes):
    assert check(f"aten.{name}", *(torch.empty(s, device="meta") for s in shapes))


def test_a_file_is_read_without_the_compiler_of_torch(small_files):
    code = """
import sys
from pathlib import Path
from edadm_compile.runtime.artifact import read
for name in sys.argv[1:]:
    assert read(Path(name)).device is not None
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(small_files["chain"])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_norms_and_joins_of_images_have_an_answer():
    x, weight = torch.empty(2, 8, 4, 4, device="meta"), torch.empty(8, device="meta")
    assert check("aten.group_norm.default", x, 4, weight, weight, 1e-5, False)
    assert check("aten.layer_norm.default", x.permute(0, 2, 3, 1), [8], weight, weight, 1e-5, False)
    assert check("aten.cat.default", [x, x], 1)
    assert check("aten.cat.default", [x.to(memory_format=torch.channels_last)] * 2, 1)
    assert check("aten.upsample_nearest2d.vec", x, None, [2.0, 2.0])
    assert check("aten.div.Tensor", x.permute(0, 2, 3, 1), 1.0)
