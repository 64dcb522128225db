"""Offload of saved tensors: the same gradients, few tensors in memory at a time, and only what is worth moving moves.

Copies to and from a GPU need one. Here `LateCopies` stand in for those of a side stream: a copy happens at the last
moment allowed, so that memory freed or used again before it was waited for shows.
"""

import ctypes
import errno
import gc
import mmap
import os
import tempfile

import pytest
import torch
from full_disk import FULL_DISK, needs_full_disk
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from k5kernels.offload import ActivationOffload, disk
from k5kernels.offload.pinned import PinnedStore
from k5kernels.offload.slot import Form

CPU = torch.device("cpu")
WIDTH = 16
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class LateCopies:
    """Copies made when they are waited for, in the order they were begun; until then they own neither end."""

    def __init__(self):
        self.begun, self.made, self.buffers = [], 0, 0

    def host_buffer(self, nbytes):
        self.buffers += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def copy(self, target, source):
        ends = [(StorageWeakRef(end.untyped_storage()), end.data_ptr()) for end in (target, source)]
        self.begun.append((ends, target.nbytes))
        return len(self.begun)

    def wait(self, copied):
        for ends, nbytes in self.begun[self.made : copied]:
            assert not any(owned.expired() for owned, _ in ends), "freed before its copy was waited for"
            ctypes.memmove(ends[0][1], ends[1][1], nbytes)
        self.made = max(self.made, copied)


class Block(nn.Module):
    """The shapes it saves are [2, 5, 16], its input's, and [2, 5, 64]."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.outer(torch.nn.functional.gelu(self.inner(x)))


def to_disk(folder, **settings):
    return ActivationOffload(folder, min_bytes=1, **settings)


def to_pinned(copies=None, **settings):
    """As on a GPU, but for the copies: CPU tensors pass for the GPU's."""
    offload = ActivationOffload(min_bytes=1, **settings)
    budget = settings.get("budget_bytes", float("inf"))
    offload.stores[CPU] = PinnedStore(CPU, budget, copies or LateCopies())
    return offload


@pytest.fixture(params=["disk", "pinned"])
def make(request, tmp_path):
    """Makes an ActivationOffload of one of the two kinds, from its settings."""
    return lambda **settings: to_disk(tmp_path, **settings) if request.param == "disk" else to_pinned(**settings)


def blocks_and_input(device=CPU, count=6):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(count))).to(device), torch.randn(2, 5, WIDTH, device=device) * 1


def forward(blocks, x, offload, checkpointed=True):
    with offload if offload is not None else torch.enable_grad():
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    return x


def gradients(offload, checkpointed=True, device=CPU, steps=2):
    """Of two steps, so that the second one uses again what the first one left."""
    blocks, x = blocks_and_input(device)
    for _ in range(steps):
        forward(blocks, x, offload, checkpointed).square().sum().backward()
    return [parameter.grad for parameter in blocks.parameters()]


def assert_bit_equal(first, second):
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_gradients_are_bit_equal_with_and_without(make, checkpointed, prefetch):
    assert_bit_equal(gradients(make(prefetch=prefetch), checkpointed), gradients(None, checkpointed))


@needs_cuda
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_bit_equal_with_and_without_on_a_gpu(checkpointed):
    offload = ActivationOffload(min_bytes=1)
    assert_bit_equal(gradients(offload, checkpointed, "cuda"), gradients(None, checkpointed, "cuda"))


def inputs_in_memory(monkeypatch, offload, count=8):
    """The most block inputs in memory at a time, over forward and backward: those of the forward and those that were
    brought back, looked at whenever a block begins or ends and whenever one is brought back."""
    owned, most = [], 0
    empty, mapped = Form.empty, disk.DiskStore.mapped

    def look(tensor):
        nonlocal most
        owned.append(StorageWeakRef(tensor.untyped_storage()))
        most = max(most, len({one.cdata for one in owned if not one.expired()}))

    def watched(form, device):
        tensor = empty(form, device)
        look(tensor)
        return tensor

    def watched_mapping(store, place):
        tensor = mapped(store, place)
        look(tensor)
        return tensor

    monkeypatch.setattr(Form, "empty", watched)
    monkeypatch.setattr(disk.DiskStore, "mapped", watched_mapping)
    blocks, x = blocks_and_input(count=count)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, arguments: look(arguments[0]))
    hidden = x + 0  # the first block's input belongs to nobody else, as the others
    del x
    with offload if offload is not None else torch.enable_grad():
        for block in blocks[:-1]:
            hidden = checkpoint(block, hidden, use_reentrant=False)
            look(hidden)
        hidden = checkpoint(blocks[-1], hidden, use_reentrant=False)
    hidden.sum().backward()
    return most


def test_at_most_three_block_inputs_are_in_memory(make, monkeypatch):
    with monkeypatch.context() as patched:
        assert inputs_in_memory(patched, None) == 8
    assert inputs_in_memory(monkeypatch, make()) == 3


def test_around_checkpointed_blocks_only_block_inputs_move_and_each_once(make, monkeypatch):
    shapes = moved(monkeypatch)
    blocks, x = blocks_and_input(count=3)
    forward(blocks, x, make())
    assert shapes == [(2, 5, WIDTH)] * 3


def test_without_checkpointing_inner_activations_move_once_and_parameters_do_not(make, monkeypatch):
    shapes = moved(monkeypatch)
    blocks, x = blocks_and_input(count=1)
    with make():
        hidden = blocks(x)
        torch.sin(hidden) * torch.cos(hidden)
    inner = [(2 * 5, WIDTH), (2, 5, 4 * WIDTH), (2 * 5, 4 * WIDTH)]  # the Linears save their inputs as matrices
    assert shapes == [*inner, *3 * [(2, 5, WIDTH)]]  # what sin and cos save both, and the two factors


def moved(monkeypatch):
    """Lists the shapes of what is moved."""
    shapes = []
    of = Form.of.__func__

    def listed(cls, tensor):
        shapes.append(tuple(tensor.shape))
        return of(cls, tensor)

    monkeypatch.setattr(Form, "of", classmethod(listed))
    return shapes


def events(monkeypatch, prefetch, folder):
    """What the backward does: asks for input i (i), after which input j was begun to be brought back (-j)."""
    said = []
    begin = disk.DiskStore.read_ahead
    monkeypatch.setattr(
        disk.DiskStore, "read_ahead", lambda s, place: said.append(("read", place.offset)) or begin(s, place)
    )
    blocks, x = blocks_and_input(count=6)
    out = forward(blocks, x, to_disk(folder, prefetch=prefetch))
    for block in blocks:
        block.register_forward_pre_hook(lambda block, arguments: said.append(("block", None)))
    out.sum().backward()
    return said


def test_an_input_is_on_its_way_before_the_backward_asks_for_it(tmp_path, monkeypatch):
    said = events(monkeypatch, 1, tmp_path)
    page = mmap.ALLOCATIONGRANULARITY
    begun = {offset // page: place for place, (what, offset) in enumerate(said) if what == "read"}
    # Of six inputs the last two are still there when the backward begins.
    assert list(begun) == [3, 2, 1, 0]
    recomputed = [place for place, (what, _) in enumerate(said) if what == "block"]
    for block, read in begun.items():
        # Blocks are recomputed from the last one down: while the one behind is, this one's input is already coming.
        assert read < recomputed[5 - block - 1]


def test_what_comes_back_has_the_values_shape_strides_and_dtype_of_what_went(make):
    for tensor in (
        torch.randn(3, 4, dtype=torch.float64).t(),
        torch.randn(5, 4, 3).bfloat16().permute(2, 0, 1),
        torch.randn(6, 4)[2:, :],
        torch.tensor([True, False]),
        torch.tensor(3.0),
    ):
        offload = make()
        packed = offload._pack(tensor)
        packed.leave()
        back = offload._unpack(packed)
        assert torch.equal(back, tensor)
        assert (back.shape, back.dtype, back.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        assert back.data_ptr() != tensor.data_ptr()


def test_a_tensor_with_gaps_comes_back_without_them(tmp_path):
    tensor = torch.randn(6, 8)[:, ::2]
    offload = to_disk(tmp_path)
    packed = offload._pack(tensor)
    packed.leave()
    assert torch.equal(offload._unpack(packed), tensor)


def test_other_shapes_of_the_same_memory_move_with_it_and_come_back_as_they_were(make, monkeypatch):
    offload, tensor = make(), torch.randn(6, 8)
    shapes = moved(monkeypatch)
    views = [tensor, tensor.view(2, 3, 8), tensor.t()]
    packed = [offload._pack(view) for view in views]
    assert shapes == [(6, 8)]
    packed[0].leave()
    for saved, view in zip(packed, views, strict=True):
        back = offload._unpack(saved)
        assert torch.equal(back, view)
        assert back.stride() == view.stride()
        assert back.data_ptr() != view.data_ptr()


def test_other_numbers_that_begin_at_the_same_place_are_told_apart(tmp_path):
    offload, tensor = to_disk(tmp_path), torch.arange(16.0)
    overlapping, gaps = tensor.as_strided((2, 4), (2, 1)), tensor.as_strided((2, 4), (8, 2))
    views = [tensor[:8], overlapping, gaps, tensor[:8].view(torch.int32), tensor[8:]]
    packed = [offload._pack(view) for view in views]
    for saved in packed:
        saved.leave()
    assert all(torch.equal(offload._unpack(saved), view) for saved, view in zip(packed, views, strict=True))


def test_at_most_twice_the_bytes_of_the_largest_tensor_are_on_their_way(make):
    offload = make()
    packed = [offload._pack(torch.randn(size)) for size in (8, 8, 4, 4, 4, 4, 4, 8)]
    here = [saved._near is not None for saved in packed]
    assert here == [False] * 5 + [True] * 3


def test_tensors_are_written_together_once_they_are_as_many_bytes_as_the_largest(tmp_path, monkeypatch):
    written = sizes_written(monkeypatch)
    offload = to_disk(tmp_path)
    large, *small = [offload._pack(torch.randn(size)) for size in (8, 2, 2)]
    large.leave()
    assert written == [32]
    small.append(offload._pack(torch.randn(4)))
    small[-1].leave()
    assert written == [32, 8, 8, 16]


def test_whoever_waits_for_a_tensor_has_it_written_at_once(tmp_path):
    offload, tensor = to_disk(tmp_path), torch.randn(2)
    first, second = offload._pack(torch.randn(8)), offload._pack(tensor)
    second.leave()
    assert torch.equal(offload._unpack(second), tensor)
    del first


def test_what_nobody_needs_any_more_is_not_written(tmp_path, monkeypatch):
    written = sizes_written(monkeypatch)
    offload = to_disk(tmp_path)
    first, second = offload._pack(torch.randn(8)), offload._pack(torch.randn(2))
    offload._unpack(second)
    memory = StorageWeakRef(second._near.untyped_storage())
    del second
    assert memory.expired()
    offload._pack(torch.randn(7)).leave()
    assert written == [32, 28]
    del first


def sizes_written(monkeypatch):
    """Lists the bytes of what is written."""
    sizes, write = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: sizes.append(len(data)) or write(file, data, at))
    return sizes


@pytest.mark.parametrize("closed", [False, True])
def test_the_thread_ends_with_its_store(tmp_path, closed):
    offload = to_disk(tmp_path)
    thread = offload.stores[CPU]._writer
    forward(*blocks_and_input(), offload).sum().backward()
    assert thread.is_alive()
    if closed:
        offload.close()
        assert not thread.is_alive()
    del offload
    gc.collect()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_second_backward_through_the_same_graph_gives_the_same(make):
    blocks, x = blocks_and_input()
    loss = forward(blocks, x, make(), checkpointed=False).sum()
    first = torch.autograd.grad(loss, list(blocks.parameters()), retain_graph=True)
    assert_bit_equal(first, torch.autograd.grad(loss, list(blocks.parameters())))


def test_a_tensor_changed_in_place_between_two_uses_is_kept_as_it_was_at_each(make):
    x = torch.randn(4, 4)
    weight = torch.ones(4, 4, requires_grad=True)
    offload = make()
    with offload:
        first = (x * weight).sum()
        # The first use has left memory when the tensor changes: two more were sent after it.
        for _ in range(2):
            torch.sin(torch.randn(4, 4) * weight)
        before = x.clone()
        x.add_(1)
        second = (x * weight).sum()
    assert torch.equal(torch.autograd.grad(second, weight)[0], before + 1)
    assert torch.equal(torch.autograd.grad(first, weight)[0], before)


def test_a_graph_that_is_dropped_gives_its_places_back(make):
    offload = make()
    blocks, x = blocks_and_input()
    out = forward(blocks, x, offload)
    store = offload.stores[CPU]
    assert store._used > 0
    del out
    gc.collect()
    assert store._used == 0


def test_host_buffers_are_used_again_by_the_next_step():
    copies = LateCopies()
    offload = to_pinned(copies)
    blocks, x = blocks_and_input(count=6)
    for _ in range(3):
        forward(blocks, x, offload).sum().backward()
    assert copies.buffers == 6


def test_no_more_than_the_budget_is_away_and_the_rest_stays(make):
    nbytes = 2 * 5 * WIDTH * 4
    offload = make(budget_bytes=2 * nbytes)
    blocks, x = blocks_and_input()
    out = forward(blocks, x, offload)
    assert offload.stores[CPU]._used == 2 * nbytes
    out.square().sum().backward()
    assert_bit_equal([p.grad for p in blocks.parameters()], gradients(None, steps=1))


def test_small_tensors_stay_where_they_are(tmp_path):
    tensor = torch.randn(4, 4)
    assert ActivationOffload(tmp_path, min_bytes=tensor.nbytes + 1)._pack(tensor) is tensor
    assert ActivationOffload(tmp_path, min_bytes=tensor.nbytes)._pack(tensor) is not tensor


@pytest.mark.parametrize("view", [lambda p: p, lambda p: p.t(), lambda p: p[1:]])
def test_parameters_and_their_views_stay_where_they_are(make, view):
    tensor = view(nn.Parameter(torch.randn(4, 4)))
    assert make()._pack(tensor) is tensor


def test_without_a_folder_cpu_tensors_stay_where_they_are():
    tensor = torch.randn(4, 4)
    assert ActivationOffload(min_bytes=0)._pack(tensor) is tensor


def test_tensors_without_data_stay_where_they_are(tmp_path):
    for tensor in (torch.empty(4, 4, device="meta"), torch.empty(0)):
        assert to_disk(tmp_path)._pack(tensor) is tensor


def test_the_folder_shows_no_file_at_any_time(tmp_path):
    folder = tmp_path / "made" / "here"
    offload = to_disk(folder)
    blocks, x = blocks_and_input()
    out = forward(blocks, x, offload)
    assert os.listdir(folder) == []
    out.sum().backward()
    offload.close()
    assert os.listdir(folder) == []


@needs_full_disk
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_full_disk_surfaces_in_the_backward_in_one_line(tmp_path, monkeypatch, checkpointed):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir, buffering: FULL_DISK.open("r+b", buffering))
    offload = to_disk(tmp_path)
    blocks, x = blocks_and_input()
    out = forward(blocks, x, offload, checkpointed)
    with pytest.raises(OSError, match="cannot keep activations for the backward") as caught:
        out.sum().backward()
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_after_a_write_that_failed_the_next_step_is_right_again(tmp_path, monkeypatch):
    offload = to_disk(tmp_path)
    blocks, x = blocks_and_input()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        out = forward(blocks, x, offload)
        with pytest.raises(OSError, match="cannot keep activations"):
            out.sum().backward()
        del out
    assert_bit_equal(gradients(offload), gradients(None))


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_place_is_taken_for_as_long_as_a_tensor_is_mapped_there_and_may_be_written_to(tmp_path):
    offload, tensor = to_disk(tmp_path), torch.randn(3, 4)
    packed = offload._pack(tensor)
    packed.leave()
    back, again = offload._unpack(packed), offload._unpack(packed)
    again.zero_()
    del packed, again
    gc.collect()
    other = offload._pack(torch.randn(3, 4))
    other.leave()
    assert torch.equal(back, tensor)
    del back, other
    gc.collect()
    assert offload.stores[CPU]._used == 0


def test_writes_of_part_of_a_tensor_go_on_where_they_stopped(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:100], at))
    assert_bit_equal(gradients(to_disk(tmp_path)), gradients(None))


def test_a_folder_that_cannot_be_one_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ActivationOffload(tmp_path / "file")


@pytest.mark.parametrize(("setting", "value"), [("budget_bytes", -1), ("budget_bytes", float("nan")), ("prefetch", -1)])
def test_a_number_out_of_range_is_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting}: expected at least 0"):
        ActivationOffload(**{setting: value})


def test_copies_of_the_fake_run_in_turn_and_only_when_waited_for():
    copies = LateCopies()
    a, b, c = torch.ones(2), torch.zeros(2), torch.zeros(2)
    first, second = copies.copy(b, a), copies.copy(c, b)
    assert b.sum() == c.sum() == 0
    copies.wait(second)
    assert b.sum() == c.sum() == 2
    copies.wait(first)
    lost = copies.copy(b, torch.ones(2))
    with pytest.raises(AssertionError, match="freed before"):
        copies.wait(lost)


@needs_cuda
def test_offload_frees_device_memory_between_forward_and_backward():
    def held(offload):
        x = torch.randn(1 << 20, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        with ActivationOffload() if offload else torch.enable_grad():
            out = x
            for _ in range(8):
                out = torch.sin(out)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before, out

    assert held(offload=True)[0] < held(offload=False)[0] / 2
