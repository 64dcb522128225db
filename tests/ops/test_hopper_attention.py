"""The kernels for Hopper serve who asks for them where they can run; their barriers end in every order."""

import random

import pytest
import torch
from block_masks import random_mask
from dense_attention import random_tokens
from hopper_protocol import FAULTS, Pair
from tolerances import assert_matches

from k5kernels import TokenLayout, block_sparse_attention
from k5kernels.attention import (
    ENGINES,
    AttentionConfig,
    EngineUnavailableError,
    NablaHopper,
    attention,
    register_engine,
)
from k5kernels.block_mask import dense_to_bits
from k5kernels.ops import hopper_attention as operator
from k5kernels.ops.hopper_attention import hopper_attention, why_not

LAYOUT = TokenLayout((1, 16, 24))
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STAGES = (4, 6, 8)
RUNS = 120


def counts(order):
    """Of a pair: entries of both, of the first alone, of the second alone; often none."""
    return tuple(order.choice((0, 0, 1, 2, 3, 5, 9, 17)) for _ in range(3))


@pytest.mark.parametrize("stages", STAGES)
def test_producer_and_consumers_end_read_their_own_entries_and_overwrite_none(stages):
    order = random.Random(stages)
    for _ in range(RUNS):
        sizes = counts(order)
        assert Pair(sizes, stages, order, None).ends(), sizes


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_sees_what_is_left_out_of_the_protocol(fault):
    order, seen = random.Random(0), 0
    for _ in range(RUNS):
        try:
            seen += not Pair(counts(order), 4, order, fault).ends()
        except AssertionError:
            seen += 1
    assert seen > 0


def test_two_stages_are_too_few():
    order = random.Random(0)
    assert not any(Pair((2, 4, 4), 2, order, None).ends() for _ in range(20))


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "layout", "reason"),
    [
        (CPU, torch.bfloat16, 64, LAYOUT, "it runs on CUDA, the tensors are on cpu"),
        (CUDA, torch.float16, 64, LAYOUT, "it takes bfloat16, the tensors are float16"),
        (CUDA, torch.bfloat16, 80, LAYOUT, "it takes head dims 64 and 128, the tensors have 80"),
        (CUDA, torch.bfloat16, 64, TokenLayout((1, 9, 8)), "layout: it takes blocks of 64 tokens each"),
        (CUDA, torch.bfloat16, 64, TokenLayout((1, 16, 16), 16), "layout: it takes blocks of 64 tokens each"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(on_hopper, device, dtype, dim, layout, reason):
    assert why_not(device, dtype, dim, layout).startswith(reason)


def test_on_hopper_it_is_accepted_and_on_no_other_gpu(on_hopper, monkeypatch):
    assert why_not(CUDA, torch.bfloat16, 128, LAYOUT) is None
    for other in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, other=other: other)
        assert why_not(CUDA, torch.bfloat16, 128, LAYOUT) == (
            f"it is for GPUs of compute capability (9, 0), this one has {other}"
        )


@pytest.mark.parametrize(("has_triton", "version"), [(False, "3.7.1"), (True, "3.5.1"), (True, "2.3")])
def test_without_gluon_it_is_refused(on_hopper, monkeypatch, has_triton, version):
    operator.has_gluon.cache_clear()
    monkeypatch.setattr(operator, "HAS_TRITON", has_triton)
    monkeypatch.setattr(operator, "version", lambda package: version)
    assert why_not(CUDA, torch.bfloat16, 64, LAYOUT) == "it needs triton 3.6 or newer, with Gluon for Hopper"
    operator.has_gluon.cache_clear()


def test_a_call_that_the_kernels_do_not_take_runs_on_nothing_else():
    mask = random_mask(LAYOUT, 1, 1)
    q = torch.zeros(1, 1, LAYOUT.tokens, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="hopper_attention: it runs on CUDA"):
        hopper_attention(q, q, q, dense_to_bits(mask.to_dense()), mask.offsets, LAYOUT)


def operator_arguments(head_dim, batch=1, heads=2):
    """q, k and v that require gradients, and the rest."""
    layout = TokenLayout((1, 8, 16))
    mask = random_mask(layout, batch, heads, 1.0)
    tokens = [x.requires_grad_() for x in random_tokens(layout, batch, heads, head_dim)]
    sizes = (layout.max_block_tokens, layout.max_clip_blocks, 0.2, True)
    return mask, (*tokens, dense_to_bits(mask.to_dense()), mask.offsets, layout.block_starts(), *sizes)


def test_the_operator_is_one_to_torch():
    torch.library.opcheck(torch.ops.k5.hopper_attention, operator_arguments(8)[1])


def test_its_gradients_are_those_of_attention_over_the_lists():
    mask, arguments = operator_arguments(8)
    grad = random_tokens(mask.layout, 1, 2, 8, seed=1)[0]
    ours = torch.autograd.grad(torch.ops.k5.hopper_attention(*arguments)[0], arguments[:3], grad)
    theirs = torch.autograd.grad(block_sparse_attention(*arguments[:3], mask, scale=0.2), arguments[:3], grad)
    for one, other in zip(ours, theirs, strict=True):
        assert_matches(one, other)


def test_no_engine_of_the_library_is_one_of_these():
    assert not any(isinstance(engine, NablaHopper) for engine in ENGINES.values())
    with pytest.raises(ValueError, match="engine: expected one of"):
        AttentionConfig("nabla_hopper")


def test_registered_it_is_asked_for_by_name_and_says_why_not():
    register_engine(NablaHopper())
    try:
        q = torch.zeros(1, 1, LAYOUT.tokens, 64, dtype=torch.bfloat16)
        with pytest.raises(EngineUnavailableError, match="it runs on CUDA, the tensors are on cpu"):
            attention(q, q, q, "nabla_hopper", LAYOUT)
        assert torch.equal(attention(q, q, q, "auto", LAYOUT), q)
    finally:
        del ENGINES["nabla_hopper"]
