"""NABLA attention: dense attention where everything is kept, and a citizen of PyTorch otherwise."""

from functools import partial

import pytest
import torch
from block_masks import random_mask, same_clip
from dense_attention import masked_attention, over_tokens, random_tokens
from operator_checks import (
    assert_accurate,
    assert_compiled_equals_eager,
    assert_thread_count_changes_no_bit,
    outputs_and_gradients,
)
from tolerances import assert_matches
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from k5kernels import BlockMask, TokenLayout, block_sparse_attention, nabla_attention, nabla_mask
from k5kernels.attention import record_block_masks

CLIPS = TokenLayout([(2, 9, 17), (1, 8, 20), (3, 5, 7)])
ODD = TokenLayout((3, 5, 7))
FULL = TokenLayout((2, 16, 8))


def dense_attention_per_clip(q, k, v, layout):
    return scaled_dot_product_attention(q, k, v, attn_mask=over_tokens(same_clip(layout, q.device), layout))


@pytest.mark.parametrize("layout", [CLIPS, ODD, FULL], ids=["clips", "odd", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_mass_kept_it_is_dense_attention_inside_each_clip(layout, dtype, device):
    tokens = random_tokens(layout, 2, 3, 16, dtype=dtype, device=device)
    assert_accurate(
        partial(nabla_attention, layout=layout, thr=1.0),
        partial(dense_attention_per_clip, layout=layout),
        tokens,
        wanted=[0, 1, 2],
    )


def test_a_frame_of_a_size_no_block_divides_is_dense_with_all_mass_kept():
    layout = TokenLayout((1, 45, 80))
    q, k, v = random_tokens(layout, 1, 1, 16)
    assert_matches(nabla_attention(q, k, v, layout, 1.0), scaled_dot_product_attention(q, k, v))


def test_a_frame_of_a_size_no_block_divides_has_the_gradients_of_attention_over_its_mask():
    layout = TokenLayout((1, 45, 80))
    tokens = random_tokens(layout, 1, 1, 16)
    mask = nabla_mask(*tokens[:2], layout, 0.7)
    assert 0.1 < mask.density < 0.7
    assert_accurate(
        partial(nabla_attention, layout=layout, thr=0.7),
        partial(masked_attention, mask=mask, layout=layout),
        tokens,
        wanted=[0, 1, 2],
    )


def test_below_that_it_is_attention_over_the_blocks_of_its_mask(device):
    tokens = random_tokens(CLIPS, 2, 3, 16, device=device)
    mask = nabla_mask(*tokens[:2], CLIPS, 0.5, (3, 1, 1))
    assert 0 < mask.density < 0.4
    actual = nabla_attention(*tokens, CLIPS, 0.5, (3, 1, 1))
    assert_matches(actual, masked_attention(*tokens, mask, CLIPS))


def test_nothing_of_another_clip_changes_a_clip():
    tokens = random_tokens(CLIPS, 1, 2, 8)
    out = nabla_attention(*tokens, CLIPS, 0.6, (3, 3, 3))
    first = slice(0, CLIPS.clip_tokens[1])
    for x in tokens:
        x[:, :, CLIPS.clip_tokens[1] :] = float("nan")
    assert torch.equal(nabla_attention(*tokens, CLIPS, 0.6, (3, 3, 3))[:, :, first], out[:, :, first])


def test_nan_is_not_hidden_by_the_mask():
    q, k, v = random_tokens(ODD, 1, 2, 8)
    k[0, 0, 3] = float("nan")
    out = nabla_attention(q, k, v, ODD, 0.5)
    assert out[0, 0].isnan().all()
    assert out[0, 1].isfinite().all()


def test_gradients_do_not_flow_through_the_mask():
    tokens = random_tokens(CLIPS, 1, 2, 8)
    mask = nabla_mask(*tokens[:2], CLIPS, 0.6)
    through = outputs_and_gradients(partial(nabla_attention, layout=CLIPS, thr=0.6), tokens, [0, 1, 2])
    given = outputs_and_gradients(partial(block_sparse_attention, mask=mask, layout=CLIPS), tokens, [0, 1, 2])
    for one, other in zip(through, given, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_and_two_thread_counts_give_the_same_bits(set_threads, dtype):
    tokens = random_tokens(CLIPS, 2, 3, 16, dtype=dtype)
    attend = partial(nabla_attention, layout=CLIPS, thr=0.6, sta=(3, 3, 3))
    assert_thread_count_changes_no_bit(lambda: outputs_and_gradients(attend, tokens, [0, 1, 2]), set_threads)


@pytest.mark.parametrize("sta", [None, pytest.param((3, 3, 3), marks=pytest.mark.slow)])  # a minute at first
def test_one_compiled_graph_serves_several_sizes(sta):
    def attend(q, k, v):  # [B, h, T, H, W, D]
        layout = TokenLayout(tuple(q.shape[2:5]))
        return nabla_attention(q.flatten(2, 4), k.flatten(2, 4), v.flatten(2, 4), layout, 0.6, sta)

    layouts = [TokenLayout((5, 9, 17)), TokenLayout((6, 11, 21))]
    arguments = [[x.unflatten(2, layout.clips[0]) for x in random_tokens(layout, 2, 3, 8)] for layout in layouts]
    assert_compiled_equals_eager(attend, arguments, [0, 1, 2])


def test_a_compiled_function_tells_layouts_of_as_many_tokens_apart():
    @partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def attend(q, k, v, layout):
        return nabla_attention(q, k, v, layout, 0.5)

    layouts = [TokenLayout((2, 8, 24)), TokenLayout((2, 12, 16)), TokenLayout([(1, 8, 24), (1, 24, 8)])]
    tokens = random_tokens(layouts[0], 1, 2, 8)
    expected = [nabla_attention(*tokens, layout, 0.5) for layout in layouts]
    assert not torch.equal(expected[0], expected[1])
    for layout, out in zip(layouts, expected, strict=True):
        assert torch.equal(attend(*tokens, layout), out)


def test_a_mask_goes_into_and_out_of_a_compiled_function():
    @torch.compile(fullgraph=True)
    def attend(q, k, v, mask):
        found = nabla_mask(q, k, mask.layout, 0.6)
        return block_sparse_attention(q, k, v, mask, mask.layout), found

    tokens, mask = random_tokens(CLIPS, 1, 2, 8), random_mask(CLIPS, 1, 2)
    out, found = attend(*tokens, mask)
    assert torch.equal(out, block_sparse_attention(*tokens, mask, CLIPS))
    assert isinstance(found, BlockMask)
    assert torch.equal(found.to_dense(), nabla_mask(*tokens[:2], CLIPS, 0.6).to_dense())


@pytest.mark.parametrize("strict", [True, False])
def test_it_can_be_exported(strict):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return nabla_attention(q, k, v, CLIPS, 0.6, (3, 3, 3))

    tokens = random_tokens(CLIPS, 1, 2, 8)
    exported = torch.export.export(Attend(), tuple(tokens), strict=strict).module()
    for seed in (0, 1):  # another seed keeps another number of blocks
        tokens = random_tokens(CLIPS, 1, 2, 8, seed)
        assert torch.equal(exported(*tokens), nabla_attention(*tokens, CLIPS, 0.6, (3, 3, 3)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_it_gives_the_same_under_activation_checkpointing(use_reentrant):
    tokens = random_tokens(CLIPS, 1, 2, 8)
    attend = partial(nabla_attention, layout=CLIPS, thr=0.6, sta=(3, 3, 3))

    def gradients(function):  # by backward(): torch.autograd.grad does not go through the reentrant kind
        leaves = [x.detach().requires_grad_() for x in tokens]
        function(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    checkpointed = partial(checkpoint, attend, use_reentrant=use_reentrant)
    for one, other in zip(gradients(checkpointed), gradients(attend), strict=True):
        assert torch.equal(one, other)


def test_under_autocast_forward_and_backward_run_in_autocasts_dtype():
    q, k, v = (x.requires_grad_() for x in random_tokens(CLIPS, 1, 2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        out = nabla_attention(q, k, v, CLIPS, 1.0)
        dense = dense_attention_per_clip(q, k, v, CLIPS)
    assert out.dtype == dense.dtype == torch.bfloat16
    assert_matches(out, dense)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [grad.dtype for grad in grads] == [torch.float32] * 3


def test_in_inference_mode_it_gives_the_same():
    tokens = random_tokens(CLIPS, 1, 2, 8)
    with torch.inference_mode():
        out = nabla_attention(*tokens, CLIPS, 0.6, (3, 3, 3))
    assert torch.equal(out, nabla_attention(*tokens, CLIPS, 0.6, (3, 3, 3)))


def test_masks_can_be_observed_while_a_context_is_open():
    tokens, seen = random_tokens(CLIPS, 1, 2, 8), []
    with record_block_masks(seen.append):
        nabla_attention(*tokens, CLIPS, 0.6)
    nabla_attention(*tokens, CLIPS, 0.7)
    assert len(seen) == 1
    assert torch.equal(seen[0].to_dense(), nabla_mask(*tokens[:2], CLIPS, 0.6).to_dense())
