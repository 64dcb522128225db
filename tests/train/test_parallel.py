"""A step on many processes is the step of one; what they cannot share is refused."""

import math

import pytest
import torch

from bench.train_equality import DENSE, EVEN, MESHES, NABLA, ODD, Case, equality
from train.parallel import ALONE, Parallel, processes

CPU = torch.device("cpu")
# Of losses and gradients, relative.
EQUAL = 1e-5


def test_one_process_needs_no_group():
    with processes(CPU) as parallel:
        assert (parallel.world, parallel.first, parallel.weights) == (1, True, None)
        assert parallel.own(3) == slice(0, 3)
        assert parallel.all_agree(False) is False
        assert parallel.mean(torch.tensor(2.0)).item() == 2
    assert not torch.distributed.is_initialized()


def test_data_ranks_share_a_batch_in_the_order_of_one_process():
    ranks = [Parallel(replicate=2, shard=2, sequence=2, rank=rank) for rank in range(8)]
    samples = [list(range(8))[parallel.own(8)] for parallel in ranks]
    assert samples == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]


def test_a_batch_that_data_ranks_do_not_divide_is_refused():
    with pytest.raises(
        ValueError, match=r"batch: expected a multiple of the 4 data ranks \(2 replicas × 2 shards\), got 6"
    ):
        Parallel(replicate=2, shard=2, sequence=2).own(6)


def test_heads_that_sequence_ranks_do_not_divide_are_refused():
    ALONE.check_heads(3)
    with pytest.raises(ValueError, match="sequence: expected a divisor of the model's 3 heads, got 2"):
        Parallel(sequence=2).check_heads(3)


@pytest.mark.parametrize("sides", [{"replicate": 2}, {"shard": 2}, {"sequence": 3}, {"shard": 0}])
def test_sides_that_do_not_make_the_number_of_processes_are_refused(sides):
    with (
        pytest.raises(ValueError, match="expected replicate × shard × sequence = 1 processes"),
        processes(CPU, **sides),
    ):
        pass


def assert_equal(rows):
    for row in rows:
        assert row.loss <= EQUAL, row
        assert row.gradient <= EQUAL, row
        # AdamW divides by the gradient's own size: what is nearly zero, and its error, become as large as the rest.
        assert row.average is None or row.average <= 1e-3, row
        assert row.flips == 0, row


def test_two_and_four_processes_train_as_one():
    cases = [
        Case((2, 1, 1), NABLA, ODD),
        Case((1, 2, 1), DENSE, ODD, steps=1),
        Case((1, 1, 2), NABLA, ODD),
        Case((1, 2, 2), NABLA, ODD),
        Case((1, 1, 4), DENSE, ODD),
    ]
    assert_equal(equality(cases))


@pytest.mark.slow
def test_meshes_of_up_to_eight_processes_train_as_one():
    meshes = [mesh for mesh in MESHES if math.prod(mesh) > 2]
    grids = [(attention, grid) for attention, grid in ((DENSE, ODD), (NABLA, EVEN), (NABLA, ODD))]
    assert_equal(equality([Case(mesh, attention, grid) for mesh in meshes for attention, grid in grids]))
