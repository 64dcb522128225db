"""A step on many processes is the step of one; what they cannot share is refused; no failure leaves others waiting."""

import pytest
import torch
from latent_samples import sample
from many_processes import packed_differences, run_on, second_rank_is_killed, second_rank_raises
from sharded_checks import offloaded

from bench.gloo_processes import on_processes
from bench.train_equality import DENSE, EVEN, MODEL, NABLA, ODD, Case, equality
from k5kernels.latents.shards import ShardWriter
from model.weights import load_crossdit
from train.log import Log
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
        assert row.clipped is None or row.clipped <= EQUAL, row
        # AdamW divides by the gradient's own size: what is nearly zero, and its error, become as large as the rest.
        assert row.average is None or row.average <= 1e-3, row
        assert row.flips == 0, row


def test_two_and_four_processes_train_as_one():
    cases = [
        Case((2, 1, 1), NABLA, ODD),
        Case((1, 2, 1), DENSE, ODD),
        Case((1, 1, 2), NABLA, ODD),
        Case((1, 2, 2), NABLA, ODD),
    ]
    assert_equal(equality(cases))


@pytest.mark.slow
def test_more_meshes_of_up_to_eight_processes_clip_update_and_average_as_one():
    cases = [
        Case((1, 1, 2), NABLA, ODD, steps=2),
        Case((2, 2, 1), NABLA, ODD),
        Case((2, 1, 2), NABLA, EVEN),
        Case((1, 1, 4), DENSE, ODD),
        Case((2, 2, 2), NABLA, ODD),
    ]
    assert_equal(equality(cases))


@pytest.mark.slow
def test_bfloat16_is_of_the_weights_that_are_gathered_and_of_no_sum():
    row, narrow = equality([Case((1, 2, 1), DENSE, ODD), Case((1, 1, 2), DENSE, ODD, bf16=True)])
    assert row.gradient <= EQUAL
    # One process computes in bfloat16 by autocast, of the same master weights: they differ by roundings of bfloat16.
    assert narrow.loss <= 1e-2
    assert 1e-4 <= narrow.gradient <= 5e-2


def test_offload_changes_no_gradient_of_two_processes():
    meshes = [(1, 2, 1), (1, 1, 2)]
    # Of each block its input.
    assert on_processes(2, offloaded, meshes) == [[list(mesh), True, MODEL.visual_blocks] for mesh in meshes]


@pytest.mark.slow
def test_two_processes_share_a_sequence_of_several_clips():
    assert max(on_processes(2, packed_differences)) <= EQUAL


@pytest.fixture
def command(tmp_path):
    """A run of two steps of a model of one block."""
    latents = tmp_path / "latents"
    latents.mkdir()
    with ShardWriter(latents / "00000.tar") as shard:
        for number in range(3):
            shard.write(sample("a.mp4", (1, 6, 6), number))
    sizes = ["--model-dim", "128", "--blocks", "1", "--batch", "2", "--steps", "2", "--every", "1"]
    return ["--latents", str(latents), "--no-captions", *sizes, "--nabla-thr", "0.9"]


def assert_one_line(ended, *words: str) -> None:
    """All processes have ended with an error, and one line of all that they wrote says which."""
    assert [code for code, _ in ended if code in (0, None)] == []
    lines = [line for _, stderr in ended for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.run: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_a_fault_of_one_process_ends_all_with_one_line(command, tmp_path):
    ended = run_on(2, [*command, "--out", str(tmp_path / "run")], tmp_path, second_rank_raises)
    assert_one_line(ended, "a fault of rank 1")


def test_what_the_processes_cannot_share_is_one_line_before_anything_is_loaded(command, tmp_path):
    options = ["--out", str(tmp_path / "run"), "--sequence", "2", "--model-dim", "192"]
    ended = run_on(2, ["--latents", "nowhere", *command[2:], *options], tmp_path)
    assert_one_line(ended, "a divisor of the model's 3 heads, got 2")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_with_one_line(command, tmp_path):
    ended = run_on(2, [*command, "--out", str(tmp_path / "run")], tmp_path, second_rank_is_killed)
    assert_one_line(ended, "another process has gone")


@pytest.mark.slow
def test_a_run_of_two_processes_writes_one_log_and_the_weights_of_one(command, tmp_path):
    for name, world, options in (("one", 1, []), ("two", 2, ["--sequence", "2"])):
        ended = run_on(world, [*command, "--out", str(tmp_path / name), *options], tmp_path)
        assert [code for code, _ in ended] == [0] * world, ended
    one, two = (load_crossdit(tmp_path / name / "crossdit.safetensors").state_dict() for name in ("one", "two"))
    losses = [[row["loss"] for row in Log(tmp_path / name / "log.jsonl").rows()] for name in ("one", "two")]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=EQUAL)
    assert one.keys() == two.keys()
    # float16 rounds to 1e-3 of a weight, and each of the two steps moves it by 1e-6 or 2e-6.
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)
