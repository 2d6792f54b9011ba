"""Who holds which rows, and masks of a batch that is divided."""

import pytest
import torch

from edadm_compile.errors import ParallelError
from edadm_compile.parallel.world import World, divided
from edadm_compile.passes.base import Context
from edadm_compile.passes.row_shares import DividedMasks, check_divisible
from edadm_compile.quant.fake_quant import MaskPool
from tests.graphs import GraphBuilder, small_config


class One(World):
    """One of several processes, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def join(self, value, share):
        self.joined = value
        return value


@pytest.mark.parametrize(("total", "size"), [(10, 3), (2, 4), (8, 2), (5, 1)])
def test_shares_cover_everything_once(total, size):
    shares = [One(rank, size).share(total) for rank in range(size)]
    assert [row for s in shares for row in range(s.start, s.stop)] == list(range(total))
    assert max(s.count for s in shares) - min(s.count for s in shares) <= 1
    assert sum(s.weight for s in shares) == pytest.approx(1)
    assert all(s.of([torch.arange(total)])[0].numel() == max(1, s.count) for s in shares)


def test_means_over_a_divided_batch_add_up_to_the_mean():
    values = torch.randn(11, dtype=torch.float64)
    rows = torch.tensor([0, 3, 3, 1, 10, 2])  # none of the second share, 4 to 7
    total = 0.0
    for rank in range(3):
        share = One(rank, 3).share(11)
        part = share.local(rows)
        total += part.weight * float(share.of([values])[0][part.rows].mean())
        assert (part.weight == 0) == (rank == 1)
    assert total == pytest.approx(float(values[rows].mean()))


def test_one_process_computes_all_rows_as_they_come():
    rows = torch.tensor([4, 0, 4])
    part = World().share(5).local(rows)
    assert part.rows is rows and part.weight == 1.0


def test_masks_are_those_of_the_whole_batch():
    def generator():
        return torch.Generator().manual_seed(3)

    whole = MaskPool(0.5, generator(), size=4096).take(torch.Size((6, 4, 3)))  # 6 samples, or 3 with two heads
    for rank in range(2):
        pool = DividedMasks(0.5, generator(), size=4096)
        part = One(rank, 2).share(6).local(torch.arange(6))
        pool.select(part)
        assert torch.equal(pool.take(torch.Size((3, 4, 3))), whole[part.places])
    heads = DividedMasks(0.5, generator(), size=4096)
    heads.select(One(1, 2).share(3).local(torch.arange(3)))
    assert torch.equal(heads.take(torch.Size((2, 4, 3))), whole[4:])


def test_a_process_without_rows_computes_one_that_does_not_count():
    world = One(3, 4)
    divided(lambda x: 2 * x, world)(torch.arange(2.0))
    assert world.joined.tolist() == [0.0]


def test_what_cannot_be_divided_is_refused():
    build = GraphBuilder()
    program = build.program(build.conv("a", build.x, 4, 4))
    ctx = Context(small_config(calib_samples=2), world=One(0, 3))
    with pytest.raises(ParallelError, match="2 calibration samples for 3 processes"):
        check_divisible(program, ctx)
    fixed = type(program.signature)(program.signature.inputs, "tensor", 2, 2)
    program = type(program)(program.graph_module, "float", fixed, program.sampler)
    with pytest.raises(ParallelError, match="captured for batches of 2 only"):
        check_divisible(program, ctx)
    check_divisible(program, Context(small_config(calib_samples=2)))  # one process takes either
