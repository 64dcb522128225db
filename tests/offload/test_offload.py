"""Offload of saved tensors: the same gradients, and only what is worth moving moves.

The copies themselves need an accelerator; without one, CPU tensors stand in for accelerator tensors, so that the whole
path but streams and pinned memory runs.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from k5kernels.offload import activations, offload_saved_tensors

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.outer(torch.nn.functional.gelu(self.inner(x)))


@pytest.fixture
def moved(monkeypatch):
    """Treats CPU tensors as an accelerator's and lists the shapes that are moved."""
    shapes = []

    def record(tensor, pinned):
        shapes.append(tuple(tensor.shape))
        return host_buffer(tensor, pinned)

    host_buffer = activations._host_buffer
    monkeypatch.setattr(activations, "_on_accelerator", lambda tensor: True)
    monkeypatch.setattr(activations, "_host_buffer", record)
    return shapes


def gradients(device, *, offload, checkpointed):
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block(), Block()).to(device)
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    hidden = x
    context = offload_saved_tensors(min_bytes=0) if offload else torch.enable_grad()
    with context:
        for block in blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False) if checkpointed else block(hidden)
    hidden.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in blocks.parameters())]


def assert_bit_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_cuda
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_bit_equal_with_and_without(checkpointed):
    assert_bit_equal(
        gradients("cuda", offload=True, checkpointed=checkpointed),
        gradients("cuda", offload=False, checkpointed=checkpointed),
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_bit_equal_through_the_copies(moved, checkpointed):
    offloaded = gradients("cpu", offload=True, checkpointed=checkpointed)
    assert moved
    assert_bit_equal(offloaded, gradients("cpu", offload=False, checkpointed=checkpointed))


def test_around_checkpointed_blocks_only_block_inputs_move(moved):
    gradients("cpu", offload=True, checkpointed=True)
    # The first block's input is a leaf, which its owner keeps.
    assert moved == [(2, 5, 16)] * 2


def test_without_checkpointing_inner_activations_move_and_parameters_do_not(moved):
    gradients("cpu", offload=True, checkpointed=False)
    assert (2, 5, 64) in moved
    assert (64, 16) not in moved
    assert (16, 64) not in moved


def test_cpu_tensors_stay_where_they_are():
    tensor = torch.randn(4, 4)
    assert activations._pack(tensor, 0) is tensor


def test_small_tensors_stay_where_they_are(moved):
    tensor = torch.randn(4, 4)
    assert activations._pack(tensor, tensor.nbytes + 1) is tensor
    assert activations._pack(tensor, tensor.nbytes) is not tensor


@pytest.mark.parametrize("view", [lambda p: p, lambda p: p.t(), lambda p: p[1:]])
def test_parameters_and_their_views_stay_where_they_are(moved, view):
    tensor = view(nn.Parameter(torch.randn(4, 4)))
    assert activations._pack(tensor, 0) is tensor


def test_what_comes_back_has_the_values_shape_and_dtype_of_what_went(moved):
    tensor = torch.randn(3, 4, dtype=torch.float64).t()
    packed = activations._pack(tensor, 0)
    assert packed.tensor.data_ptr() != tensor.data_ptr()
    back = activations._unpack(packed)
    assert torch.equal(back, tensor)
    assert (back.shape, back.dtype, back.stride()) == (tensor.shape, tensor.dtype, tensor.stride())


def test_meta_tensors_have_no_data_and_stay_where_they_are():
    tensor = torch.empty(4, 4, device="meta")
    assert activations._pack(tensor, 0) is tensor


@needs_cuda
def test_offload_frees_device_memory_between_forward_and_backward():
    def held(offload):
        x = torch.randn(1 << 20, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        with offload_saved_tensors() if offload else torch.enable_grad():
            out = x
            for _ in range(8):
                out = torch.sin(out)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, out

    assert held(offload=True)[0] < held(offload=False)[0] / 2
