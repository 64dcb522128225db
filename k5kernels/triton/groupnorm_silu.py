"""GroupNorm and SiLU on the GPU: statistics, then their use; x is read twice and the result written once.

The backward reads x three times and the gradient twice: statistics, sums for each channel, the gradient of x.
"""

import torch
from torch import Tensor

from k5kernels.triton.groupnorm_silu_apply import (
    channel_sums,
    groupnorm_silu_apply,
    launch_gradient,
    parameters,
    sum_groups,
)
from k5kernels.triton.groupnorm_statistics import groupnorm_statistics
from k5kernels.triton.position_tiles import dense, elementwise_tiles, empty_result


def groupnorm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """As in `k5kernels.ops.groupnorm_silu`."""
    x = dense(x)
    return groupnorm_silu_apply(x, *groupnorm_statistics(x, groups), weight, bias, eps)


def groupnorm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, these two in float32."""
    grad_x = empty_result(x)
    if x.numel() == 0:
        of_weight, of_bias = (x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
        return grad_x, of_weight, of_bias
    grad, x = dense(grad, x), dense(x)
    given = (grad, x, *groupnorm_statistics(x, groups), *parameters(weight, bias))
    of_bias, of_weight = channel_sums(given, eps, None)
    share = x.shape[0] * groups / x.numel()
    means = [share * sum_groups(of_channels, weight, groups) for of_channels in (of_bias, of_weight)]
    launch_gradient(elementwise_tiles(x), given, means, grad_x, None, eps)
    return grad_x, of_weight.sum(0), of_bias.sum(0)
