"""NABLA's selection: sort, cumulative sum and threshold of the pooled attention map, united with STA."""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from block_masks import assert_rows_keep_their_largest_block_alone, block_logits, same_clip, same_lists, select
from dense_attention import far_apart, random_tokens
from diffusers.models.transformers.transformer_kandinsky import nablaT_v2
from hypothesis import example, given
from hypothesis import strategies as st
from operator_checks import assert_thread_count_changes_no_bit

from k5kernels import TokenLayout, nabla_mask, sta_mask
from k5kernels.ops.nabla_mask import nabla_mask_reference

RAGGED = TokenLayout([(2, 9, 17), (1, 8, 20), (3, 5, 7)])


def constant_blocks(values: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Tokens [1, 1, S, D] that have the value [N_b, D] of their block."""
    return values.repeat_interleave(layout.block_starts(values.device).diff(), dim=0)[None, None]


def margins(q, k, layout, thr):
    """How far, in float64, each row is from another selection: [B, h, N_b].

    From a cumulative sum to 1 - thr, or from the largest probability dropped to the smallest kept.
    """
    probabilities, _ = block_logits(q, k, layout).softmax(-1).sort(-1)
    distance = probabilities.cumsum(-1) - torch.tensor(1 - thr, dtype=torch.float32).item()
    own_clip = probabilities > 0
    first_kept = (distance < 0).sum(-1, keepdim=True).clamp(max=layout.blocks - 1)
    steps = probabilities.diff(dim=-1, prepend=probabilities.new_zeros(1).expand(*probabilities.shape[:-1], 1))
    return distance.abs().where(own_clip, torch.inf).amin(-1).minimum(steps.gather(-1, first_kept).squeeze(-1))


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 20, 64, 128])),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(0.05, 1),
    st.integers(0, 99),
)
@example([(1, 1, 1)], (1, 1, 1), torch.float32, 0.5, 0)  # one token
@example([(1, 8, 8)], (2, 1, 64), torch.bfloat16, 0.5, 0)  # one block
def test_the_kernel_selects_what_sort_and_cumulative_sum_select(device, grids, sizes, dtype, thr, seed):
    layout = TokenLayout(grids)
    q, k, _ = random_tokens(layout, *sizes, seed, dtype=dtype, device=device)
    ours, theirs = (
        select(function, q, k, layout, thr).to_dense() for function in (torch.ops.k5.nabla_mask, nabla_mask_reference)
    )
    clear = margins(q, k, layout, thr) > 1e-6
    assert torch.equal(ours[clear], theirs[clear])
    assert (ours.sum(-1) - theirs.sum(-1)).abs().max() <= 1


MEMORY = """
import torch
from pathlib import Path
import k5kernels as k5
layout = k5.TokenLayout((61, 48, 80))  # Video Pro, 10 s, HD: 3,660 blocks
random = torch.Generator().manual_seed(0)
# One head's tokens serve all 32: what counts is what the kernel adds.
q, k = (torch.randn(1, 1, layout.tokens, 128, generator=random).expand(1, 32, -1, -1) for _ in range(2))
k5.nabla_mask(q[:, :1], k[:, :1], layout, 0.4, (11, 3, 3))
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
def added(call):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    result = call()
    return result, peak() - before
mask, for_mask = added(lambda: k5.nabla_mask(q, k, layout, 0.4, (11, 3, 3)))
transposed, for_transpose = added(mask.transpose)
print(for_mask, for_transpose, mask.indices.nbytes + mask.offsets.nbytes, mask.indices.numel())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_mask_of_ten_seconds_of_pro_hd_takes_two_gibibytes_to_build_and_its_own_memory_again_to_transpose():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    added, added_by_transpose, mask_bytes, kept = map(int, done.stdout.split())
    assert kept > 10**6
    assert mask_bytes <= 1.1 * 4 * kept
    assert added - mask_bytes <= 2 << 30
    assert mask_bytes + added_by_transpose <= 2.2 * 4 * kept


@pytest.mark.parametrize("thr", [0.0, 0.4, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("window", [None, (11, 3, 3)])
@pytest.mark.parametrize("grid", [(4, 16, 24), (1, 8, 8), (12, 8, 16)])
def test_the_selection_is_that_of_diffusers(grid, window, thr, device):
    layout = TokenLayout(grid)
    q, k, _ = random_tokens(layout, 2, 3, 32, device=device)
    near = torch.zeros(layout.blocks, layout.blocks, dtype=torch.bool, device=device)
    if window:
        near = sta_mask(layout, window, device).to_dense()[0, 0]
    theirs = nablaT_v2(q.transpose(1, 2), k.transpose(1, 2), near, thr).to_dense().bool()
    ours = nabla_mask(q, k, layout, thr, window).to_dense()
    if thr > 0:  # sums are rounded differently, which changes a selection once in a while
        assert (ours != theirs).sum() <= 2
        return
    largest = block_logits(q, k, layout).argmax(-1, keepdim=True)
    assert torch.equal(ours, torch.zeros_like(ours).scatter_(-1, largest, True) | near)
    assert not (theirs & ~ours).any()  # they keep the largest block or, where the sum of all rounds below one, nothing


def test_the_mass_kept_is_the_smallest_that_reaches_thr(device):
    layout = TokenLayout((1, 8, 32))
    q = torch.ones(4, 1, device=device)
    probabilities = torch.tensor([0.125, 0.5, 0.125, 0.25], device=device)
    k = probabilities.log()[:, None]
    for thr, kept in [(0.4, [1]), (0.55, [1, 3]), (0.76, [1, 3, "tie"]), (0.9, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])]:
        mask = nabla_mask(constant_blocks(q, layout), constant_blocks(k, layout), layout, thr)
        row = mask.to_dense()[0, 0, 0].nonzero().flatten().tolist()
        if "tie" in kept:  # one of two equal blocks, whichever
            assert set(row) in ({0, 1, 3}, {1, 2, 3})
        else:
            assert row == kept


def test_of_equal_blocks_as_many_are_kept_as_thr_needs(device):
    layout = TokenLayout((1, 16, 32))
    zeros = torch.zeros(1, 1, layout.tokens, 4, device=device)
    for thr, kept in [(0.125, 2), (0.5, 5), (0.75, 7), (1.0, 8)]:  # the sum that is 1 - thr exactly is kept too
        assert nabla_mask(zeros, zeros, layout, thr).to_dense().sum(-1).unique().tolist() == [kept]


def test_thr_one_keeps_every_block_of_the_clip_and_none_of_another(device):
    q, k, _ = random_tokens(RAGGED, 2, 3, 8, device=device)
    dense = nabla_mask(q, k, RAGGED, 1.0).to_dense()
    assert torch.equal(dense, same_clip(RAGGED, device).expand_as(dense))


# For all of these 1 - thr is 1 in float32; the sum of all probabilities rounds below 1 in some rows only.
@pytest.mark.parametrize("thr", [0.0, 1e-12, 2.0**-26])
@pytest.mark.parametrize("layout", [TokenLayout((4, 16, 16)), RAGGED, TokenLayout((700, 1, 1), 1)], ids=str)
def test_at_thr_zero_or_next_to_it_every_row_keeps_its_largest_block(layout, thr, isa, device):
    q, k, _ = random_tokens(layout, 1, 4, 32, device=device)
    mask = nabla_mask(q, k, layout, thr).to_dense()
    assert_rows_keep_their_largest_block_alone(mask, block_logits(q, k, layout))


def test_at_thr_zero_a_block_that_has_all_the_mass_is_kept(isa, device):
    layout = TokenLayout((4, 16, 16))
    peaked = torch.eye(layout.blocks, device=device) * 100
    own = nabla_mask(constant_blocks(peaked, layout), constant_blocks(peaked, layout), layout, 0.0)
    assert torch.equal(own.to_dense()[0, 0], torch.eye(layout.blocks, dtype=torch.bool, device=device))


@pytest.mark.parametrize("blocks", [1, 3, 7, 64, 700])
def test_of_largest_blocks_that_are_equal_thr_zero_keeps_the_last(blocks, isa, device):
    layout = TokenLayout((blocks, 1, 1), block_side=1)
    q = torch.ones(1, 1, blocks, 1, device=device)
    for largest in (slice(0, blocks), slice(0, blocks // 2 + 1), slice(blocks // 2, blocks)):
        k = torch.zeros_like(q)
        k[:, :, largest] = 1
        expected = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
        expected[:, range(blocks)[largest][-1]] = True
        assert torch.equal(nabla_mask(q, k, layout, 0.0).to_dense()[0, 0], expected)


@given(st.integers(0, 99), st.one_of(st.floats(0, 1e-6), st.floats(0, 1)))
def test_no_row_is_empty_whatever_thr_is(isa, device, seed, thr):
    q, k, _ = random_tokens(RAGGED, 1, 2, 8, seed, device=device)
    kept, logits = nabla_mask(q, k, RAGGED, thr).to_dense(), block_logits(q, k, RAGGED)
    largest = logits.masked_fill(~kept, -torch.inf).amax(-1)
    assert (largest >= logits.amax(-1) - 1e-5 * logits.amax(-1).abs().clamp(min=1)).all()


@given(st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_thr_keeps_all_that_a_lower_one_keeps(device, seed, one, other):
    q, k, _ = random_tokens(RAGGED, 1, 2, 8, seed, device=device)
    low, high = (nabla_mask(q, k, RAGGED, thr).to_dense() for thr in sorted((one, other)))
    assert not (low & ~high).any()


def test_a_clip_is_masked_as_if_it_stood_alone():
    q, k, _ = random_tokens(RAGGED, 2, 2, 8)
    dense = nabla_mask(q, k, RAGGED, 0.7, (3, 1, 3)).to_dense()
    tokens, blocks = RAGGED.clip_tokens, RAGGED.clip_blocks
    for number, grid in enumerate(RAGGED.clips):
        here = slice(tokens[number], tokens[number + 1])
        alone = nabla_mask(q[:, :, here], k[:, :, here], TokenLayout(grid), 0.7, (3, 1, 3))
        own = slice(blocks[number], blocks[number + 1])
        assert torch.equal(dense[:, :, own, own], alone.to_dense())
    assert not dense[:, :, ~same_clip(RAGGED)].any()


def test_a_small_block_is_the_mean_of_the_tokens_it_has():
    q, k, _ = random_tokens(RAGGED, 1, 2, 8)
    ranges = [slice(*ends) for ends in pairwise(RAGGED.block_starts().tolist())]
    flat_q, flat_k = q.clone(), k.clone()
    for block in ranges:
        flat_q[:, :, block] = q[:, :, block].mean(2, keepdim=True)
        flat_k[:, :, block] = k[:, :, block].mean(2, keepdim=True)
    assert same_lists(nabla_mask(flat_q, flat_k, RAGGED, 0.7), nabla_mask(q, k, RAGGED, 0.7))


def test_a_small_block_counts_as_much_as_a_whole_one():
    ragged, whole = TokenLayout((2, 9, 17)), TokenLayout((2, 16, 24))
    random = torch.Generator().manual_seed(0)
    q, k = (3 * torch.randn(whole.blocks, 8, generator=random) for _ in range(2))
    masks = [
        nabla_mask(constant_blocks(q, layout), constant_blocks(k, layout), layout, 0.7).to_dense()
        for layout in (ragged, whole)
    ]
    assert torch.equal(*masks)


@pytest.mark.parametrize("thr", [0.0, 0.5, 0.9])
def test_the_window_adds_its_blocks_to_every_head(thr, device):
    q, k, _ = random_tokens(RAGGED, 2, 3, 8, device=device)
    window = (3, 3, 1)
    chosen = nabla_mask(q, k, RAGGED, thr).to_dense()
    near = sta_mask(RAGGED, window, device).to_dense()
    assert torch.equal(nabla_mask(q, k, RAGGED, thr, window).to_dense(), chosen | near)


@pytest.mark.parametrize("thr", [0.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_defined_probabilities_keep_their_whole_clip(value, thr, device):
    q, k, _ = random_tokens(RAGGED, 2, 2, 8, device=device)
    clean = nabla_mask(q, k, RAGGED, thr).to_dense()
    block = RAGGED.block_starts().tolist()
    q[0, 1, block[2]] = value  # an infinite mean gives an infinite logit or NaN somewhere in the row
    mask = nabla_mask(q, k, RAGGED, thr).to_dense()
    assert torch.equal(mask[0, 1, 2], same_clip(RAGGED, device)[2])
    mask[0, 1, 2] = clean[0, 1, 2]
    assert torch.equal(mask, clean)


def test_a_key_that_is_nan_keeps_all_in_its_clip_and_head_only(device):
    q, k, _ = random_tokens(RAGGED, 2, 2, 8, device=device)
    clean = nabla_mask(q, k, RAGGED, 0.5).to_dense()
    k[1, 0, 3] = float("nan")
    mask = nabla_mask(q, k, RAGGED, 0.5).to_dense()
    first = slice(0, RAGGED.clip_blocks[1])
    assert mask[1, 0, first, first].all()
    mask[1, 0, first, first] = clean[1, 0, first, first]
    assert torch.equal(mask, clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_pooled_and_normalized_in_float32(dtype):
    q, k, _ = random_tokens(RAGGED, 1, 2, 16, dtype=dtype)
    assert same_lists(nabla_mask(q, k, RAGGED, 0.7), nabla_mask(q.float(), k.float(), RAGGED, 0.7))


def test_autocast_does_not_change_the_mask():
    q, k, _ = random_tokens(RAGGED, 2, 4, 16)
    outside = nabla_mask(q, k, RAGGED, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_lists(nabla_mask(q, k, RAGGED, 0.7), outside)


def test_the_reference_does_not_depend_on_the_chunks_it_computes_in(monkeypatch):
    q, k, _ = random_tokens(RAGGED, 2, 3, 8)
    whole = select(nabla_mask_reference, q, k, RAGGED, 0.7, (3, 3, 3))
    for chunk in (1, 60, 2 * RAGGED.blocks**2):
        monkeypatch.setattr("k5kernels.ops.nabla_mask.CHUNK", chunk)
        assert same_lists(select(nabla_mask_reference, q, k, RAGGED, 0.7, (3, 3, 3)), whole)


def test_strides_of_projections_need_no_copy_by_the_caller(device):
    q, k, _ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_tokens(RAGGED, 2, 3, 8, device=device))
    assert not q.is_contiguous()
    assert same_lists(nabla_mask(q, k, RAGGED, 0.7), nabla_mask(q.contiguous(), k.contiguous(), RAGGED, 0.7))


def test_tokens_further_apart_than_32_bits_count_are_found():
    layout = TokenLayout((1, 9, 8))
    q, k, _ = random_tokens(layout, 1, 2, 64)
    assert same_lists(nabla_mask(*far_apart([q, k]), layout, 0.7), nabla_mask(q, k, layout, 0.7))


def test_two_runs_and_two_thread_counts_give_the_same_lists(set_threads):
    q, k, _ = random_tokens(RAGGED, 2, 3, 8)

    def lists():
        mask = nabla_mask(q, k, RAGGED, 0.7, (3, 3, 3))
        return mask.offsets, mask.indices

    assert_thread_count_changes_no_bit(lists, set_threads)


def test_no_batch_and_one_token_are_masks_too():
    layout = TokenLayout((1, 1, 1))
    assert nabla_mask(torch.zeros(0, 2, 1, 4), torch.zeros(0, 2, 1, 4), layout, 0.5).indices.numel() == 0
    one = torch.ones(1, 1, 1, 4)
    assert nabla_mask(one, one, layout, 0.5).to_dense().tolist() == [[[[True]]]]


def test_the_operator_passes_pytorchs_checks(device):
    q, k, _ = random_tokens(RAGGED, 2, 2, 8, device=device)
    starts, clips = RAGGED.block_starts(device), RAGGED.clip_block_starts(device)
    layout = (starts, clips, RAGGED.max_block_tokens, RAGGED.max_clip_blocks)
    near = sta_mask(RAGGED, (3, 1, 1), device)
    torch.library.opcheck(torch.ops.k5.nabla_mask, (q, k, *layout, 0.7, None, None))
    torch.library.opcheck(torch.ops.k5.nabla_mask, (q, k, *layout, 0.7, near.offsets, near.indices))


def test_what_does_not_fit_is_refused():
    q = torch.zeros(1, 2, RAGGED.tokens, 8)
    with pytest.raises(ValueError, match="q: expected a floating"):
        nabla_mask(q[:, :, 1:], q, RAGGED, 0.5)
    with pytest.raises(ValueError, match=r"k: expected torch\.float32"):
        nabla_mask(q, q.double(), RAGGED, 0.5)
    for thr in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="thr: expected the probability mass"):
            nabla_mask(q, q, RAGGED, thr)
    with pytest.raises(ValueError, match="sta: expected three positive integers"):
        nabla_mask(q, q, RAGGED, 0.5, (3, 3))
