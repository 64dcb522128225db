"""Launches can be recorded, and launchers read shapes, strides and dtypes but no values of tensors."""

import pytest
import torch
import triton
import triton.language as tl
from block_masks import random_mask
from dense_attention import random_tokens

from k5kernels import TokenLayout
from k5kernels.ops.sta_mask import kept_blocks
from k5kernels.triton import attention_configurations as configurations
from k5kernels.triton import bits_attention, fractal, nabla_mask, sta_mask
from k5kernels.triton import block_sparse_attention as attention
from k5kernels.triton.launch import generation_of, launch, record_launches

RAGGED = TokenLayout([(2, 9, 17), (1, 8, 20)])
FULL = TokenLayout((2, 16, 24))


@triton.jit
def add_kernel(source, target, number, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at) + number)


def test_a_launch_is_run_or_recorded():
    source, target = torch.arange(4.0), torch.zeros(4)
    with record_launches(90) as launches:
        launch(add_kernel, (1,), source, target, 2, N=4, num_warps=1)
    assert not target.any()
    assert [(one.kernel, one.grid, one.arguments[2:], one.constants) for one in launches] == [
        (add_kernel, (1,), (2,), {"N": 4, "num_warps": 1})
    ]
    launch(add_kernel, (1,), source, target, 2, N=4, num_warps=1)
    assert target.tolist() == [2, 3, 4, 5]


def test_what_is_recorded_is_chosen_for_the_gpu_named():
    with record_launches(120):
        assert generation_of(torch.device("cuda")) == 12


def on(device, layout, dim=64):
    """Arguments of the two launchers of attention."""
    mask = random_mask(layout, 1, 2)
    q, k, v = random_tokens(layout, 1, 2, dim, dtype=torch.bfloat16)
    lists = [mask.offsets.to(device), mask.indices.to(device), layout.block_starts(device), layout.max_block_tokens]
    lse = torch.zeros(1, 2, layout.tokens, device=device)
    q, k, v = (x.to(device) for x in (q, k, v))
    return (q, k, v, *lists, 0.1), (q, lse, q, k, v, q, lse, *lists, 0.1)


def described(launches):
    """What distinguishes launches; tensors by shape, strides and dtype."""

    def value(x):
        x = getattr(x, "base", x)
        return (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x

    return [(one.kernel, one.grid, [value(x) for x in one.arguments], one.constants) for one in launches]


@pytest.mark.parametrize("dim", [64, 128])
def test_on_sm_90_attention_is_launched_as_measured_fastest(dim):
    forward, backward = on("meta", FULL, dim)
    with record_launches(90) as launches:
        attention.block_sparse_attention(*forward)
        attention.block_sparse_attention_backward(*backward)
    tiled = [one.constants for one in launches if "TMA" in one.constants]
    assert [(one["num_warps"], one["num_stages"], one["TMA"]) for one in tiled] == [(4, 2, True)] * 3


def test_tensors_that_no_descriptor_can_describe_are_loaded_by_address():
    (q, k, v, *lists), _ = on("meta", FULL, 64)
    k = k[:, :, :1].expand(k.shape)
    with record_launches(90) as launches:
        attention.block_sparse_attention(q, k, v, *lists)
    assert [one.constants["TMA"] for one in launches] == [False]


@pytest.mark.parametrize("generation", [8, 9, 10, 12])
@pytest.mark.parametrize("kernel", configurations.KERNELS)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("possible", [False, True])
def test_every_generation_has_a_configuration(generation, kernel, dim, element_size, possible):
    chosen = configurations.configuration(kernel, element_size, dim, generation, possible)
    assert chosen.warps in (4, 8)
    assert not chosen.descriptors or (possible and generation >= 9 and element_size == 2)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("layout", [FULL, RAGGED], ids=["full", "ragged"])
def test_attention_launches_the_same_without_the_values_of_its_tensors(layout, capability):
    recorded = []
    for device in ("cpu", "meta"):  # a read of a value on "meta" raises
        forward, backward = on(device, layout)
        with record_launches(capability) as launches:
            attention.block_sparse_attention(*forward)
            attention.block_sparse_attention_backward(*backward)
        recorded.append(described(launches))
    assert len(recorded[0]) > 5
    assert recorded[0] == recorded[1]


def test_masks_of_a_layout_and_fractal_order_read_no_values():
    window = [3, 3, 1]
    with record_launches(90) as launches:
        kept = kept_blocks(RAGGED, window)
        _, indices = sta_mask.sta_mask(RAGGED.block_coordinates("meta"), window, kept)
        flat = fractal.fractal_flatten(torch.empty(1, 2, 16, 24, 8, device="meta"), 8)
        fractal.fractal_unflatten(flat, 2, 16, 24, 8)
    assert indices.shape == (kept,)
    assert len(launches) == 4


def nabla_arguments(device, near_entries=9):
    q = torch.empty(1, 2, RAGGED.tokens, 64, device=device)
    starts = (RAGGED.block_starts(device), RAGGED.clip_block_starts(device))
    near = (
        torch.zeros(1, 1, RAGGED.blocks + 1, dtype=torch.int64, device=device),
        torch.zeros(near_entries, dtype=torch.int32, device=device),
    )
    return q, q, *starts, RAGGED.max_block_tokens, RAGGED.max_clip_blocks, 0.9, *near


def test_nabla_attention_reads_no_number_forward_or_backward():
    recorded = []
    for device in ("cpu", "meta"):  # a read of a value on "meta" raises
        arguments = nabla_arguments(device)
        q, block_starts = arguments[0], arguments[2]
        sizes = (RAGGED.max_block_tokens, RAGGED.max_clip_blocks, 0.1)
        with record_launches(90) as launches:
            bits, offsets = nabla_mask.nabla_bits(*arguments)
            offsets.zero_()  # the launches that would have written it were recorded
            given = (bits, offsets, block_starts, *sizes)
            out, lse = bits_attention.bits_attention(q, q, q, *given)
            bits_attention.bits_attention_backward(q, lse, q, q, q, out, lse, *given)
        recorded.append(described(launches))
    assert len(recorded[0]) > 10
    assert recorded[0] == recorded[1]


def test_a_public_mask_reads_one_number_the_length_of_its_lists():
    with record_launches(90) as launches, pytest.raises(RuntimeError, match="item"):
        nabla_mask.nabla_mask(*nabla_arguments("meta"))
    assert launches[-1].kernel is nabla_mask.select_kernel
