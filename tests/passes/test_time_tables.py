import pytest
import torch
from torch import nn

from edadm_compile.errors import InputError
from edadm_compile.ir.program import Program, placeholders
from edadm_compile.passes.canonicalize import Canonicalize
from edadm_compile.passes.time_tables import FoldTimePath
from tests.graphs import TinyUNet, apply, assert_close, assert_same_function, captured, inputs_for


@pytest.fixture(scope="module")
def plain():
    """A tiny UNet without conditions, canonical."""
    return apply(captured(TinyUNet()), Canonicalize())[0]


def _folded(model, **options):
    before = model if isinstance(model, Program) else apply(captured(model, **options), Canonicalize())[0]
    after, ctx = apply(before, FoldTimePath())
    return before, after, ctx.stats["time_tables"]


class _Timed(nn.Module):
    """A convolution shifted by a time embedding."""

    def __init__(self, width=4, inner=8, function=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.second = nn.Conv2d(3, width, 1), nn.Linear(4, inner), nn.Linear(inner, width)
        self.function = function

    def forward(self, x, t):
        if self.function is not None:
            return self.function(self, x, t)
        powers = t.float()[:, None] * torch.tensor([0.001, 0.01, 0.1, 1.0])
        return self.conv(x) + self.second(torch.sin(self.first(powers)))[:, :, None, None]


def test_rule_1_values_of_the_timestep_alone_become_tables():
    before, after, stats = _folded(TinyUNet(classes=5), num_classes={"label": 5})
    assert placeholders(after.graph_module.graph)[:3] == ["x", "t", "label"] and stats["tables"] == 1
    assert set(stats) >= {"folded_layers", "rows", "path"} and stats["folded_layers"] == 2
    assert set(after.time.folded) == {"time.0", "time.2"}  # the sum with the label stays
    assert_same_function(before, after, depth=0)  # random timesteps go by the path: the same operators


def test_all_projections_of_the_embedding_fold_without_conditions(plain):
    _, after, stats = _folded(plain)
    assert set(after.time.folded) == {"time.0", "time.2", "block1.emb", "block2.emb", "block3.emb"}
    assert stats["tables"] == 3 and not [
        n for n in after.graph_module.graph.nodes if "emb" in str(n.target) or "time.0" in str(n.target)
    ]


def test_rows_equal_the_path_at_every_key(plain):
    _, after, _ = _folded(plain)
    time = after.time
    assert time.path is not None and time.keys.tolist() == [0.0, 25.0, 50.0, 75.0]
    for position, key in enumerate(time.keys):
        rows = time.path(torch.tensor([int(key)]))
        for name, row in zip(time.path_outputs, rows, strict=True):
            assert torch.equal(time.tables[name][position], row[0])


def test_known_timesteps_read_the_tables(plain):
    before, after, _ = _folded(plain)
    x, t = inputs_for(before)[0], torch.tensor([75, 0, 50])
    with torch.no_grad():
        assert_close(after(x, t), before(x, t))
    changed = {name: torch.zeros_like(table) for name, table in after.time.tables.items()}
    after.time.tables.update(changed)
    with torch.no_grad():
        assert float((after(x, t) - before(x, t)).abs().max()) > 1e-3  # they do


def test_other_timesteps_go_by_the_path(plain):
    before, after, _ = _folded(plain)
    x, t = inputs_for(before)[0], torch.tensor([75, 1, 50])  # one unknown is enough
    after.time.tables.update({name: torch.full_like(table, torch.nan) for name, table in after.time.tables.items()})
    with torch.no_grad():
        assert torch.equal(after(x, t), before(x, t))


def test_a_short_schedule_is_stored_whole():
    before, after, stats = _folded(_Timed(width=3, inner=256))
    assert stats["path"] is False and after.time.path is None
    assert after.time.keys.tolist() == list(range(100)) and stats["rows"] == 100
    assert_same_function(before, after)
    with pytest.raises(InputError, match="0 to 99"):
        after(inputs_for(before)[0], torch.tensor([3, 100, 5]))


def test_a_small_path_is_kept():
    _, after, stats = _folded(_Timed(inner=8))
    assert stats["path"] is True and after.time.keys.numel() == 4


def test_a_model_that_ignores_the_timestep_has_no_tables():
    _, after, stats = _folded(_Timed(function=lambda self, x, t: self.conv(x)))
    assert after.time is None and stats == {"tables": 0, "changed": False, "seconds": stats["seconds"]}


def test_a_mere_reshape_of_the_timestep_stays_in_the_graph():
    before, after, stats = _folded(_Timed(function=lambda self, x, t: self.conv(x) + t.float().reshape(-1, 1, 1, 1)))
    assert stats["tables"] == 0
    assert_same_function(before, after, depth=0)


def test_a_value_without_a_batch_stays_in_the_graph():
    def function(self, x, t):
        shared = self.second(torch.sin(self.first(t.float().mean() * torch.ones(1, 4))))
        return self.conv(x) + shared[:, :, None, None]

    before, after, stats = _folded(_Timed(function=function))
    assert stats["tables"] == 0
    assert_same_function(before, after, depth=0)
