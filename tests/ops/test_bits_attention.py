"""Attention over a mask of bits: that over the mask's lists, with nothing that the host must wait for."""

from functools import partial

import pytest
import torch
from block_masks import random_mask
from dense_attention import masked_attention, random_tokens
from operator_checks import assert_accurate
from torch._subclasses import FakeTensorMode

from k5kernels import BlockMask, TokenLayout, nabla_attention, nabla_mask
from k5kernels.attention import nabla, record_block_masks
from k5kernels.block_mask import bits_to_dense, dense_to_bits
from k5kernels.ops.bits_attention import bits_attention
from k5kernels.ops.nabla_mask import nabla_bits

CLIPS = TokenLayout([(2, 9, 17), (1, 8, 20), (3, 5, 7)])
FULL = TokenLayout((3, 16, 24))
WINDOW = (3, 3, 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 70])
def test_bits_of_a_dense_mask_and_back(blocks):
    dense = torch.rand(2, 3, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = dense_to_bits(dense)
    assert bits.shape == (2, 3, blocks, -(-blocks // 32))
    assert torch.equal(bits_to_dense(bits), dense)
    assert dense_to_bits(torch.ones(32, dtype=torch.bool)).tolist() == [-1]


@pytest.mark.parametrize("layout", [CLIPS, FULL], ids=["clips", "full"])
@pytest.mark.parametrize("sta", [None, WINDOW])
@pytest.mark.parametrize("thr", [0.0, 0.6, 1.0])
def test_the_bits_are_those_of_the_mask(layout, sta, thr, device):
    q, k, _ = random_tokens(layout, 2, 3, 16, device=device)
    bits, offsets = nabla_bits(q, k, layout, thr, sta)
    mask = nabla_mask(q, k, layout, thr, sta)
    assert torch.equal(bits_to_dense(bits), mask.to_dense())
    assert torch.equal(offsets, mask.offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention_over_the_lists(dtype, device):
    tokens, mask = random_tokens(CLIPS, 2, 3, 16, dtype=dtype, device=device), random_mask(CLIPS, 2, 3, device=device)
    bits = dense_to_bits(mask.to_dense())
    ours = partial(bits_attention, bits=bits, offsets=mask.offsets, layout=CLIPS)
    assert_accurate(ours, partial(masked_attention, mask=mask, layout=CLIPS), tokens, wanted=[0, 1, 2])


def test_the_operators_pass_pytorchs_checks(device):
    q, k, v = (x.requires_grad_() for x in random_tokens(CLIPS, 1, 2, 8, device=device))
    starts, clips = CLIPS.block_starts(device), CLIPS.clip_block_starts(device)
    sizes = (CLIPS.max_block_tokens, CLIPS.max_clip_blocks)
    torch.library.opcheck(torch.ops.k5.nabla_bits, (q.detach(), k.detach(), starts, clips, *sizes, 0.6, None, None))
    bits, offsets = nabla_bits(q, k, CLIPS, 0.6)
    rest = (bits, offsets, starts, *sizes, 0.3)
    torch.library.opcheck(torch.ops.k5.bits_attention, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.k5.bits_attention(q, k, v, *rest)
    for grad_lse in (None, lse.nan_to_num(0, 0, 0)):
        arguments = (torch.ones_like(out), grad_lse, q, k, v, out, lse, *rest)
        torch.library.opcheck(torch.ops.k5.bits_attention_backward, arguments)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`nabla_attention` takes the operators that it takes on a GPU, here on their references."""
    monkeypatch.setattr(nabla, "lists_make_the_host_wait", lambda device: True)


def test_no_shape_of_nabla_attention_on_a_gpu_depends_on_the_data(as_on_a_gpu):
    with FakeTensorMode():  # a size that depends on data raises, and so does reading a value
        tokens = [torch.empty(1, 2, CLIPS.tokens, 64, requires_grad=True) for _ in range(3)]
        out = nabla_attention(*tokens, CLIPS, 0.6, WINDOW)
        grads = torch.autograd.grad(out, tokens, torch.ones_like(out))
    assert [x.shape for x in (out, *grads)] == [tokens[0].shape] * 4


def test_nabla_attention_on_a_gpu_is_attention_over_its_mask(as_on_a_gpu):
    tokens = random_tokens(CLIPS, 2, 3, 16)
    mask = nabla_mask(*tokens[:2], CLIPS, 0.6, WINDOW)
    ours = partial(nabla_attention, layout=CLIPS, thr=0.6, sta=WINDOW)
    assert_accurate(ours, partial(masked_attention, mask=mask, layout=CLIPS), tokens, wanted=[0, 1, 2])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tokens), ours(*tokens))


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", [CLIPS, FULL], ids=["clips", "full"])
def test_the_host_never_waits_for_the_gpu(layout, compiled):
    tokens = random_tokens(layout, 1, 2, 64, dtype=torch.bfloat16, device="cuda")
    attend = partial(nabla_attention, layout=layout, thr=0.6, sta=WINDOW)
    attend = torch.compile(attend, fullgraph=True) if compiled else attend
    leaves, grad = [x.requires_grad_() for x in tokens], torch.ones_like(tokens[0])
    torch.autograd.grad(attend(*leaves), leaves, grad)  # kernels are compiled, and the layout's tensors made
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(attend(*leaves), leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_forward_and_backward_are_captured_in_a_cuda_graph_and_replayed_on_other_tokens():
    first, second = ([x.cuda() for x in random_tokens(CLIPS, 1, 2, 64, seed, torch.bfloat16)] for seed in (0, 1))
    leaves, grad = [x.clone().requires_grad_() for x in first], torch.ones_like(first[0])

    def step():
        out = nabla_attention(*leaves, CLIPS, 0.6, WINDOW)
        return [out, *torch.autograd.grad(out, leaves, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tokens in (second, first):  # another number of blocks is kept
        for leaf, x in zip(leaves, tokens, strict=True):
            leaf.data.copy_(x)
        graph.replay()
        replayed = [x.clone() for x in captured]
        for one, other in zip(replayed, step(), strict=True):
            assert torch.equal(one, other)


def test_observed_masks_are_lists_and_change_nothing(device):
    tokens, seen = random_tokens(CLIPS, 1, 2, 16, device=device), []
    with record_block_masks(seen.append):
        out = nabla_attention(*tokens, CLIPS, 0.6)
    assert isinstance(seen[0], BlockMask)
    assert torch.equal(nabla_attention(*tokens, CLIPS, 0.6), out)
