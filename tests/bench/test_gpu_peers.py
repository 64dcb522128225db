"""What `bench.gpu` times beside this library: adapters to packages of the real signatures, and the released mask."""

import sys
from types import ModuleType

import pytest
import torch
from block_masks import random_mask
from dense_attention import masked_attention, random_tokens
from tolerances import assert_matches

from bench.gpu.peers import PEERS, Peer, against, fastvideo, flashinfer, flex
from bench.gpu.released_mask import DIFFUSERS, kept_map, operators, released_mask
from bench.gpu.run import make_run
from k5kernels import BlockMask, TokenLayout, sta_mask

LAYOUT = TokenLayout((1, 16, 24))
CPU = torch.device("cpu")
HEADS, DIM = 2, 16


def over_blocks(q, k, v, dense):
    """Dense attention under a map over blocks; a row that reads nothing is left out of the comparison by the mask."""
    return masked_attention(q, k, v, BlockMask.from_dense(dense, LAYOUT), LAYOUT)


def map_of(lists, counts):
    dense = torch.zeros(*counts.shape, LAYOUT.blocks, dtype=torch.bool)
    for at in torch.cartesian_prod(*map(torch.arange, counts.shape)).tolist():
        dense[*at, lists[*at, : counts[*at]].long()] = True
    return dense


def from_indices(q, k, v, q2k_idx, q2k_num, variable_block_sizes):
    assert all(x.is_contiguous() for x in (q, k, v, q2k_idx, q2k_num))
    assert (q2k_idx.dtype, q2k_num.dtype, variable_block_sizes.dtype) == (torch.int32,) * 3
    assert variable_block_sizes.tolist() == [64] * LAYOUT.blocks
    return over_blocks(q, k, v, map_of(q2k_idx, q2k_num)), None


def from_map(q, k, v, block_map, variable_block_sizes):
    assert block_map.shape == (1, HEADS, LAYOUT.blocks, LAYOUT.blocks)
    return over_blocks(q, k, v, block_map), None


class Wrapper:
    """The parts of FlashInfer's class that are called, by its names."""

    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.numel() == 128 << 20

    def plan(
        self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None, rope_scale=None,
        rope_theta=None, non_blocking=True, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert (num_qo_heads, num_kv_heads, head_dim, q_data_type) == (HEADS, HEADS, DIM, torch.bfloat16)
        assert block_row_sz.shape == block_col_sz.shape == (HEADS, LAYOUT.blocks)
        self.map = block_mask_map

    def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
        assert q.shape == (HEADS, LAYOUT.tokens, DIM)
        return over_blocks(q[None], k[None], v[None], self.map[None])[0]


@pytest.fixture
def package(monkeypatch):
    """Pretend that a package with these functions is installed."""

    def install(name, **functions):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        parent = name.partition(".")[0]
        if parent != name:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))

    return install


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("peer", ["lists", "map", "flashinfer"])
def test_a_peer_is_given_the_same_blocks(peer, shared, package):
    package("flashinfer", VariableBlockSparseAttentionWrapper=Wrapper)
    package(
        "fastvideo_kernel.block_sparse_attn",
        **({"block_sparse_attn_from_indices": from_indices} if peer == "lists" else {"block_sparse_attn": from_map}),
    )
    prepare = {"lists": fastvideo, "map": fastvideo, "flashinfer": flashinfer}[peer]
    mask = random_mask(LAYOUT, 1, 1 if shared else HEADS)
    tokens = random_tokens(LAYOUT, 1, HEADS, DIM)
    expected = masked_attention(*tokens, mask, LAYOUT)
    assert_matches(prepare(mask, HEADS, DIM, CPU)(*tokens), expected)


def test_a_release_with_other_parameters_is_refused(package):
    package("fastvideo_kernel.block_sparse_attn", block_sparse_attn=lambda q, k, v, mask: None)
    with pytest.raises(TypeError, match="expected the parameters q, k, v, block_map, variable_block_sizes, got q, k"):
        fastvideo(random_mask(LAYOUT, 1, HEADS), HEADS, DIM, CPU)


def test_a_peer_that_is_not_installed_is_one_row():
    rows = []
    absent = Peer("other", "no_such_package", flex, has_backward=True)
    for peer in (absent, PEERS[0]):
        against(peer, make_run(True, rows.append))
    assert [(row.variant, row.unit, row.median) for row in rows] == [
        ("other", "not run: the package no_such_package is not installed", None),
        ("flex", "not run: FlexAttention skips blocks only where it is compiled, for a GPU", None),
    ]
    assert [peer.name for peer in PEERS] == ["flex", "fastvideo", "flashinfer"]


def test_a_peer_whose_result_differs_is_not_timed():
    rows = []
    wrong = Peer("wrong", "torch", lambda *_: lambda q, k, v: 2 * v, has_backward=False)
    with pytest.raises(AssertionError, match="against wrong: they differ by"):
        against(wrong, make_run(True, rows.append))
    assert rows == []


@pytest.mark.parametrize("thr", [0.4, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_released_masks_operators_are_those_of_diffusers(thr, dtype):
    released = pytest.importorskip(DIFFUSERS).nablaT_v2
    q, k, _ = (x.transpose(1, 2) for x in random_tokens(LAYOUT, 2, HEADS, DIM, dtype=dtype))
    sta = sta_mask(LAYOUT, (1, 3, 1)).to_dense()
    theirs = released(q, k, sta, thr)
    ours = operators(q, k, sta, thr)
    assert torch.equal(ours[0], theirs.full_kv_num_blocks)
    assert torch.equal(kept_map(ours), theirs.to_dense().bool())
    name, function = released_mask()
    assert name == "diffusers nablaT_v2"
    assert torch.equal(kept_map(function(q, k, sta, thr)), kept_map(ours))
