"""`winograd_conv3d`: a convolution of any size, nearly as accurate as the plain sum, the same bits on any threads."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from operator_checks import assert_thread_count_changes_no_bit
from torch import Tensor

from k5kernels.ops.winograd_conv3d import winograd_conv3d, winograd_conv3d_reference, winograd_filters


def inputs(channels_in: int, channels_out: int, size: tuple[int, int, int], batch: int = 1) -> tuple[Tensor, ...]:
    """x for an output of this size, weight and bias; values of the size that a normalized activation has."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels_in, *(side + 2 for side in size), generator=random)
    weight = torch.randn(channels_out, channels_in, 3, 3, 3, generator=random) / (27 * channels_in) ** 0.5
    x = x.contiguous(memory_format=torch.channels_last_3d)
    return x, weight, torch.randn(channels_out, generator=random)


def error_of(out: Tensor, exact: Tensor) -> float:
    """Largest error over the largest value."""
    assert out.shape == exact.shape
    return float((out - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("channels", [(128, 128), (256, 128), (512, 16)])
def test_from_128_channels_on_the_error_is_a_few_roundings(isa, channels):
    x, weight, bias = inputs(*channels, (2, 9, 11))
    exact = F.conv3d(x.double(), weight.double(), bias.double())
    assert error_of(winograd_conv3d(x, winograd_filters(weight), bias), exact) < 1e-5
    assert error_of(F.conv3d(x, weight, bias), exact) < 1e-5


@given(
    channels=st.tuples(st.sampled_from([8, 24]), st.sampled_from([16, 48])),
    size=st.tuples(st.integers(1, 6), st.integers(1, 14), st.integers(1, 14)),
    batch=st.integers(1, 2),
)
def test_any_size_equals_the_plain_convolution_up_to_its_borders(isa, channels, size, batch):
    x, weight, bias = inputs(*channels, size, batch)
    out = winograd_conv3d(x, winograd_filters(weight), bias)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert error_of(out, F.conv3d(x.double(), weight.double(), bias.double())) < 1e-5


def test_many_blocks_in_time_and_space_are_joined_without_a_seam(isa):
    x, weight, bias = inputs(8, 16, (9, 31, 66))
    out = winograd_conv3d(x, winograd_filters(weight), bias)
    assert error_of(out, F.conv3d(x.double(), weight.double(), bias.double())) < 1e-5


@pytest.mark.parametrize("channels", [(8, 256), (24, 512), (16, 1024), (8, 272)])
@pytest.mark.parametrize("size", [(1, 5, 6), (3, 2, 9)])
def test_few_blocks_are_cut_along_the_channels_without_a_seam(isa, channels, size):
    x, weight, bias = inputs(*channels, size)
    out = winograd_conv3d(x, winograd_filters(weight), bias)
    assert error_of(out, F.conv3d(x.double(), weight.double(), bias.double())) < 1e-5


def test_the_reference_takes_the_weight_back_from_its_filters():
    x, weight, bias = inputs(16, 32, (2, 5, 6))
    expected = F.conv3d(x.double(), weight.double(), bias.double())
    out = winograd_conv3d_reference(x.double(), winograd_filters(weight), bias)
    assert error_of(out, expected) < 1e-6


@pytest.mark.parametrize("size", [(2, 9, 6), (5, 20, 31)])
def test_what_does_not_vary_in_space_stays_so_to_the_last_bit(isa, size):
    x, weight, bias = inputs(72, 16, size, batch=2)
    flat = x[..., :1, :1].expand_as(x)
    out = winograd_conv3d(flat, winograd_filters(weight), bias)
    torch.testing.assert_close(out, out[..., :1, :1].expand_as(out), rtol=0, atol=0)
    assert error_of(out, F.conv3d(flat.double(), weight.double(), bias.double())) < 1e-5


def test_memory_formats_and_strides_change_no_bit(isa):
    x, weight, bias = inputs(16, 32, (3, 6, 7), batch=2)
    filters = winograd_filters(weight)
    expected = winograd_conv3d(x, filters, bias)
    for other in (x.contiguous(), x.repeat_interleave(2, dim=4)[..., ::2]):
        assert not other.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(winograd_conv3d(other, filters, bias), expected, rtol=0, atol=0)


def test_weights_in_half_precision_and_strided_give_the_filters_of_their_values():
    weight = inputs(8, 16, (1, 1, 1))[1].bfloat16()
    expected = winograd_filters(weight.float())
    torch.testing.assert_close(winograd_filters(weight), expected, rtol=0, atol=0)
    channels_last = weight.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(winograd_filters(channels_last), expected, rtol=0, atol=0)


def test_thread_count_changes_no_bit(isa, set_threads):
    if isa == "reference":
        pytest.skip("PyTorch promises no order of its sums")
    x, weight, bias = inputs(16, 32, (6, 21, 34))
    filters = winograd_filters(weight)
    assert_thread_count_changes_no_bit(lambda: winograd_conv3d(x, filters, bias), set_threads, (1, 2, 3))


def test_a_batch_without_samples_gives_none(isa):
    x, weight, bias = inputs(8, 16, (2, 3, 4), batch=2)
    assert winograd_conv3d(x[:0], winograd_filters(weight), bias).shape == (0, 16, 2, 3, 4)


def test_opcheck_passes():
    x, weight, bias = inputs(8, 16, (2, 5, 4))
    torch.library.opcheck(torch.ops.k5.winograd_conv3d, (x, winograd_filters(weight), bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 3, 3, 3)}, r"x: expected torch.float32 \[B, 8, .*got torch.float32 \[8, 3, 3, 3\]"),
        ({"x": torch.zeros(1, 16, 3, 3, 3)}, r"x: expected .*\[B, 8, .*got torch.float32 \[1, 16, 3, 3, 3\]"),
        ({"x": torch.zeros(1, 8, 2, 3, 3)}, r"x: expected .*got torch.float32 \[1, 8, 2, 3, 3\]"),
        ({"x": torch.zeros(1, 8, 3, 3, 3).double()}, r"x: expected torch.float32 .*got torch.float64"),
        ({"filters": torch.zeros(16, 8, 3, 3, 3)}, r"filters: expected those of winograd_filters .*\[16, 8, 3, 3, 3\]"),
        ({"filters": torch.zeros(37, 1, 24, 16).double()}, r"filters: expected .*got torch.float64 \[37, 1, 24, 16\]"),
        ({"filters": torch.zeros(37, 1, 0, 16)}, r"filters: expected .*got torch.float32 \[37, 1, 0, 16\]"),
        ({"bias": torch.zeros(32)}, r"filters: expected those of winograd_filters for bias \[32\]"),
        ({"bias": torch.zeros(24)}, r"bias: expected floating \[C_out\], a multiple of 16, got torch.float32 \[24\]"),
        ({"bias": torch.zeros(16).int()}, r"bias: expected floating \[C_out\], .*got torch.int32 \[16\]"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    good = {"x": torch.zeros(1, 8, 3, 3, 3), "filters": torch.zeros(37, 1, 24, 16), "bias": torch.zeros(16)}
    with pytest.raises(ValueError, match=message):
        winograd_conv3d(**(good | change))


@pytest.mark.parametrize("shape", [(16, 12, 3, 3, 3), (24, 8, 3, 3, 3), (16, 8, 1, 3, 3), (16, 8, 3, 3)])
def test_a_weight_that_does_not_fit_is_named(shape):
    with pytest.raises(ValueError, match=r"weight: expected \[C_out, C_in, 3, 3, 3\], C_out a multiple of 16"):
        winograd_filters(torch.zeros(shape))
