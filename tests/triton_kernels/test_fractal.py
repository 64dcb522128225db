"""Fractal order by the Triton kernel: the same bits in the same places as its definition."""

import pytest
import torch

from k5kernels.ops.fractal import COPIED_DTYPES, fractal_flatten_reference, fractal_unflatten_reference
from k5kernels.triton import fractal as kernels

SHAPES = [(1, 1, 1, 1, 4), (2, 2, 9, 17, 3), (1, 3, 8, 16, 2, 5), (2, 1, 11, 5), (1, 1, 4, 4, 9000)]


def values(shape, dtype):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, torch.empty(0, dtype=dtype).element_size()), generator=random).byte()


def tokens(shape, dtype):
    """Any bits, NaN among them; a bool holds 0 or 1."""
    if dtype == torch.bool:
        return values(shape, dtype)[..., 0] > 127
    return values(shape, dtype).view(dtype)[..., 0]


def same_bits(one, other):
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", COPIED_DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_go_where_the_definition_puts_them_and_back(shape, dtype):
    x = tokens(shape, dtype)
    flat = kernels.fractal_flatten(x, 8)
    assert same_bits(flat, fractal_flatten_reference(x, 8))
    back = kernels.fractal_unflatten(flat, *shape[1:4], 8)
    assert same_bits(back, x)
    assert same_bits(back, fractal_unflatten_reference(flat, *shape[1:4], 8))


def test_strided_and_empty_tensors():
    x = tokens((2, 2, 9, 10, 6), torch.float32)
    for strided in (
        x[..., ::2],
        x.transpose(2, 3),
        x.movedim(-1, 1).movedim(1, -1),
        x[:, :, 1:, :8, 1:4],
        x[:0],
        x[..., :0],
    ):
        assert same_bits(kernels.fractal_flatten(strided, 4), fractal_flatten_reference(strided, 4))
