"""What is known from a layout is not asked of the device: a compiled call then never waits for it."""

from functools import partial

import pytest
import torch
from block_masks import random_mask
from dense_attention import random_tokens
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from k5kernels import TokenLayout, block_sparse_attention, nabla_attention, sta_mask
from k5kernels.attention import nabla

CLIPS = TokenLayout([(2, 9, 17), (1, 8, 20)])
CLIP = TokenLayout((2, 9, 17))  # a window over one clip: shapes of several take the compiler's arithmetic long
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount", "unique_dim", "_unique2"}
COPIES = {"lift_fresh", "_to_copy", "copy_"}


def operators_of(function, arguments):
    """Names of the aten and k5 operators in the compiled graph, forward and backward."""
    names = []

    def keep(graph, inputs):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        names.extend(
            str(node.target).split(".")[-2] for node in nodes if isinstance(node.target, torch._ops.OpOverload)
        )
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=keep))
    compiled(*arguments).sum().backward()
    return names


@pytest.mark.parametrize("sta", [None, pytest.param((3, 3, 1), marks=pytest.mark.slow)])
def test_a_compiled_nabla_attention_reads_nothing_back(sta):
    layout = CLIP if sta else CLIPS
    tokens = [x.requires_grad_() for x in random_tokens(layout, 1, 2, 8)]
    names = operators_of(partial(nabla_attention, layout=layout, thr=0.6, sta=sta), tokens)
    assert {"nabla_mask", "block_sparse_attention", "block_sparse_attention_backward"} <= set(names)
    assert ("sta_mask" in names) == (sta is not None)
    assert READS & set(names) == set()


def test_as_on_a_gpu_it_reads_nothing_back_and_has_no_size_that_is_known_later(monkeypatch):
    monkeypatch.setattr(nabla, "lists_make_the_host_wait", lambda device: True)
    tokens = [x.requires_grad_() for x in random_tokens(CLIP, 1, 2, 8)]
    names = operators_of(partial(nabla_attention, layout=CLIP, thr=0.6, sta=(3, 3, 1)), tokens)
    assert {"nabla_bits", "bits_attention", "bits_attention_backward", "sta_mask"} <= set(names)
    assert {"nabla_mask", "sym_constrain_range_for_size", *READS} & set(names) == set()


def test_attention_over_a_given_mask_reads_nothing_back():
    mask = random_mask(CLIPS, 1, 2)
    tokens = [x.requires_grad_() for x in random_tokens(CLIPS, 1, 2, 8)]
    names = operators_of(partial(block_sparse_attention, mask=mask), tokens)
    assert READS & set(names) == set()


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_tensors_of_a_layout_are_computed_and_not_copied_from_numbers_of_the_host():
    with Operators() as operators:
        for tensor in (CLIPS.block_starts, CLIPS.clip_block_starts, CLIPS.block_coordinates, CLIPS.permutation):
            tensor()
        CLIPS.inverse_permutation()
    assert operators.names
    assert (READS | COPIES) & set(operators.names) == set()


def test_a_sliding_tile_mask_has_a_length_known_beforehand():
    mask = sta_mask(CLIPS, (3, 3, 1))
    with torch._subclasses.FakeTensorMode():  # a length that depends on data would raise
        assert sta_mask(CLIPS, (3, 3, 1)).indices.shape == mask.indices.shape
