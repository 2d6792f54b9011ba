"""Arguments of nodes, by position, by name and by default."""

import pytest

from edadm_compile.ir.arguments import argument, pair
from tests.graphs import GraphBuilder


def test_an_argument_by_position_by_name_and_by_default():
    build = GraphBuilder()
    node = build.op("aten.gelu.default", build.x, approximate="tanh")
    assert argument(node, 0, "self") is build.x
    assert argument(node, 1, "approximate") == argument(node, 1, "approximate", "none") == "tanh"
    assert argument(node, 1, "other") is None and argument(node, 1, "other", 7) == 7
    node = build.op("aten.transpose.int", build.x, 0, 2)
    assert argument(node, 1, "dim0", 5) == 0  # a value that is false is a value
    assert argument(node, 2, "dim1", 5) == 2 and argument(node, 3, "dim2", 5) == 5


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, [3, 3]), ([3], [3, 3]), ((3,), [3, 3]), ([3, 4], [3, 4]), ((3, 4), [3, 4]), (0, [0, 0])],
    ids=str,
)
def test_pairs(value, expected):
    given = list(value) if isinstance(value, list) else value
    assert pair(given) == expected
    assert given == value  # the argument itself stays as it was
