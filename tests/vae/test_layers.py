"""The layers of the VAE in chunks of frames: together the chunks give what the whole clip gives."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import MERGED_STATISTICS, assert_matches
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from k5kernels.ops.groupnorm_statistics import groupnorm_statistics
from k5kernels.vae.layers import CausalConv3d, Downsample, FrameCausalAttention, Norm, NormSiLU, ResnetBlock, Upsample
from k5kernels.vae.passes import Storage, layer_by_layer, one_pass
from k5kernels.vae.steps import steps_of

# The first chunk has a frame at least; one frame first, chunks that divide nothing, chunks of none.
CHUNKS = [[1, 4, 4], [4, 3, 2], [9], [1] * 9, [2, 0, 7], [1, 1, 5, 2]]
GROUPS = 4


def activation(B: int, C: int, T: int, H: int, W: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)


def randomized(layer: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The layer with every parameter random: biases and norms too."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / max(1, parameter[0].numel()) ** 0.5)
    return layer.to(dtype)


def in_chunks(forward_chunk: Callable[..., tuple[Tensor, Any]], x: Tensor, chunks: Sequence[int]) -> Tensor:
    """The outputs of forward_chunk(chunk, before), joined."""
    outs, state = [], None
    for chunk in x.split(list(chunks), dim=2):
        out, state = forward_chunk(chunk, state)
        outs.append(out)
    return torch.cat(outs, dim=2)


@given(
    kernel_and_stride=st.sampled_from([(1, (1, 1, 1)), (3, (1, 1, 1)), (3, (1, 2, 2)), (3, (2, 2, 2))]),
    first=st.integers(1, 5),
    rest=st.lists(st.integers(0, 5), max_size=5),
    height=st.integers(1, 5),
)
@example(kernel_and_stride=(3, (2, 2, 2)), first=1, rest=[1, 1, 1, 1], height=4)
@example(kernel_and_stride=(3, (2, 2, 2)), first=1, rest=[4, 4], height=3)
@torch.inference_mode()
def test_a_convolution_in_chunks_gives_the_bits_of_the_whole(kernel_and_stride, first, rest, height):
    # Whole numbers, so that the order in which a kernel sums changes nothing.
    random = torch.Generator().manual_seed(0)
    conv, chunks = CausalConv3d(3, 5, *kernel_and_stride), [first, *rest]
    for parameter in conv.parameters():
        parameter.copy_(torch.randint(-8, 9, parameter.shape, generator=random))
    x = torch.randint(-8, 9, (2, 3, sum(chunks), height, 4), generator=random).float()
    torch.testing.assert_close(in_chunks(conv.forward_chunk, x, chunks), conv(x), rtol=0, atol=0)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
@torch.inference_mode()
def test_a_convolution_keeps_fewer_frames_than_its_kernel_has(kernel, stride):
    conv, before = CausalConv3d(2, 2, kernel, (stride, 1, 1)), None
    for frames in (5, 1, 0, 1, 4):
        _, before = conv.forward_chunk(torch.zeros(1, 2, frames, 3, 3), before)
        assert before.shape[2] < kernel
        assert before.untyped_storage().nbytes() == before.numel() * 4  # the chunk itself is not kept alive


@pytest.mark.parametrize("chunks", CHUNKS)
@torch.inference_mode()
def test_a_downsampling_in_chunks_equals_the_whole(chunks):
    layer, x = randomized(Downsample(4, (2, 2, 2))), activation(2, 4, 9, 6, 5)
    assert_matches(in_chunks(layer.forward_chunk, x, chunks), layer(x))


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 2, 2)])
@pytest.mark.parametrize("chunks", CHUNKS)
@torch.inference_mode()
def test_an_upsampling_in_chunks_equals_the_whole(chunks, factor):
    layer, x = randomized(Upsample(4, factor)), activation(2, 4, 9, 3, 5)
    assert_matches(in_chunks(layer.forward_chunk, x, chunks), layer(x))


@pytest.mark.parametrize("channels_out", [8, 12])
@pytest.mark.parametrize("chunks", CHUNKS)
@torch.inference_mode()
def test_a_residual_block_in_chunks_with_the_whole_clips_statistics_equals_the_whole(chunks, channels_out):
    block, x = randomized(ResnetBlock(8, channels_out, GROUPS)), activation(2, 8, 9, 5, 6)
    middle = block.conv1(block.norm1(x))
    statistics = [groupnorm_statistics(x, GROUPS), groupnorm_statistics(middle, GROUPS)]
    out = torch.cat(list(one_pass(steps_of([block], None), x.split(chunks, dim=2), statistics)), dim=2)
    assert_matches(out, block(x))


@pytest.mark.parametrize("chunks", CHUNKS)
@torch.inference_mode()
def test_a_residual_block_can_run_layer_by_layer_without_ever_seeing_the_whole(chunks):
    block, x = randomized(ResnetBlock(8, 12, GROUPS), torch.float32), activation(1, 8, 9, 7, 6, torch.float32)
    with Storage(None) as storage:
        outputs, statistics = layer_by_layer(steps_of([block], None), x.split(chunks, dim=2), storage)
    assert_matches(torch.cat(outputs, dim=2), block(x))
    whole = groupnorm_statistics(x, GROUPS)
    for merged, of_whole in zip(statistics[0][1:], whole[1:], strict=True):
        torch.testing.assert_close(merged, of_whole, rtol=0, atol=MERGED_STATISTICS[torch.float32])


@pytest.mark.parametrize("chunks", CHUNKS)
@torch.inference_mode()
def test_attention_in_chunks_equals_the_whole(chunks):
    layer, x = randomized(FrameCausalAttention(8, GROUPS)), activation(2, 8, 9, 2, 3)
    statistics = groupnorm_statistics(x, GROUPS)
    out = in_chunks(lambda chunk, before: layer.forward_chunk(chunk, statistics, before), x, chunks)
    assert_matches(out, layer(x))


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("window", [1, 2, 4])
@torch.inference_mode()
def test_attention_in_a_window_sees_so_many_frames_and_keeps_no_more(chunks, window):
    layer, x = randomized(FrameCausalAttention(8, GROUPS)), activation(2, 8, 9, 2, 3)
    statistics, kept = groupnorm_statistics(x, GROUPS), []

    def forward_chunk(chunk, before):
        out, after = layer.forward_chunk(chunk, statistics, before, window)
        kept.append(after[0].shape[2] // 6)
        return out, after

    tokens = layer.group_norm(x).permute(0, 2, 3, 4, 1).flatten(1, 3)
    frame = torch.arange(9).repeat_interleave(6)
    distance = frame[:, None] - frame
    seen = scaled_dot_product_attention(
        layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens), attn_mask=(distance >= 0) & (distance < window)
    )
    expected = x + layer.to_out[0](seen).unflatten(1, (9, 2, 3)).permute(0, 4, 1, 2, 3)
    assert_matches(in_chunks(forward_chunk, x, chunks), expected.contiguous(memory_format=torch.channels_last_3d))
    assert max(kept) <= window


@torch.inference_mode()
def test_attention_never_takes_the_kernel_that_writes_all_its_scores():
    layer, x = randomized(FrameCausalAttention(8, GROUPS), torch.float32), activation(1, 8, 3, 4, 4, torch.float32)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        assert layer(x).isfinite().all()


@pytest.mark.parametrize("norm", [Norm, NormSiLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_norm_by_given_statistics_of_x_is_the_norm(norm, dtype):
    layer, x = randomized(norm(GROUPS, 8, 1e-6), dtype), activation(2, 8, 3, 5, 4, dtype)
    out = layer(x, groupnorm_statistics(x, GROUPS))
    assert_matches(out, layer(x))
    other = groupnorm_statistics(2 * x + 1, GROUPS)
    assert (layer(x, other) - out).abs().max() > 0.1


@pytest.mark.parametrize(
    ("x", "before", "message"),
    [
        (torch.zeros(1, 2, 0, 3, 3), None, "x: expected at least one frame in the first chunk, got none"),
        (
            torch.zeros(1, 2, 1, 3, 3),
            torch.zeros(1, 2, 2, 3, 4),
            r"before: expected torch.float32 \[1, 2, 'T', 3, 3\], got torch.float32 \[1, 2, 2, 3, 4\]",
        ),
        (torch.zeros(1, 2, 1, 3, 3), torch.zeros(1, 2, 2, 3, 3).double(), r"before: .*got torch.float64"),
    ],
)
def test_what_cannot_follow_is_refused(x, before, message):
    with pytest.raises(ValueError, match=message):
        CausalConv3d(2, 2).forward_chunk(x, before)


def test_a_stride_in_time_beyond_the_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel: expected at least the stride in time, 2, got 1"):
        CausalConv3d(2, 2, kernel=1, stride=(2, 1, 1))
