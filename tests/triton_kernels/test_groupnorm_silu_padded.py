"""GroupNorm by given statistics, SiLU and a border of copies, by the Triton kernel."""

import pytest
import torch
from activations import activation, make_small, parameters
from kernel_checks import assert_kernel_accurate

from k5kernels.ops.groupnorm_silu_apply import EPS
from k5kernels.ops.groupnorm_silu_padded import groupnorm_silu_padded_reference
from k5kernels.triton.groupnorm_silu_padded import groupnorm_silu_padded


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    make_small(monkeypatch)


@pytest.mark.parametrize(
    ("shape", "pad", "dtype", "channels_last"),
    [
        ((2, 4, 2, 3, 2), (2, 1, 1), torch.float32, True),
        ((1, 4, 2, 2, 3), (1, 0, 2), torch.bfloat16, True),
        ((1, 2, 2, 3, 2), (2, 1, 1), torch.float16, False),
        ((1, 2, 1, 1, 1), (1, 1, 1), torch.float32, False),
    ],
)
def test_several_tiles_runs_and_sizes_of_one(shape, pad, dtype, channels_last):
    x = activation(*shape, dtype=dtype, channels_last=channels_last)
    arguments = (x, *parameters(x, 2), pad, EPS)
    assert_kernel_accurate(groupnorm_silu_padded, groupnorm_silu_padded_reference, arguments)
    out = groupnorm_silu_padded(*arguments)
    assert out.stride() == groupnorm_silu_padded_reference(*arguments).stride()


@pytest.mark.parametrize("shape", [(0, 4, 2, 3, 2), (1, 4, 0, 3, 2)])
def test_no_values(shape):
    x = torch.zeros(shape)
    assert groupnorm_silu_padded(x, *parameters(x, 2), (0, 1, 1), EPS).numel() == 0
